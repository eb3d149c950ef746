"""``lint``: whether a file will be computed rightly, and as fast and small as it could be."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import keras

from keras_dst.export.tflite import check_exportable, check_installed


@dataclass(frozen=True)
class Finding:
    """One thing to change in a model or a file.

    Attributes:
        level: ``"error"`` where results are wrong or the runtime refuses the file on some CPU,
            ``"advice"`` where the file is larger or slower than need be.
        rule: the name of the rule.
        where: the op or the tensor.
        found: what is the matter with it.
        fix: what to change.
    """

    level: Literal["error", "advice"]
    rule: str
    where: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.found} [{self.rule}]\n  Fix: {self.fix}"


@dataclass(frozen=True)
class LintReport:
    """What `lint` found. `str()` is a list for reading, errors first.

    Attributes:
        name: of the file, or of the model.
        sparse_inference: whether XNNPACK computes in its sparse form on CPUs without AVX.
        reason: why not, or how much of the model.
        findings: errors, then advice.

    Example:
        >>> print(keras_dst.lint("model.tflite"))
    """

    name: str
    sparse_inference: bool
    reason: str
    findings: list[Finding]

    @property
    def errors(self) -> list[Finding]:
        """The findings of level ``"error"``."""
        return [finding for finding in self.findings if finding.level == "error"]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        engages = "yes" if self.sparse_inference else "no"
        advice = len(self.findings) - len(self.errors)
        lines = [f"{self.name}: errors: {len(self.errors)}, advice: {advice}"]
        lines.append(f"Sparse inference by XNNPACK on ARM: {engages}, {self.reason}.")
        return "\n".join(lines + [str(finding) for finding in self.findings])


def lint(model: keras.Model | str | os.PathLike[str] | bytes) -> LintReport:
    """Looks for what makes a ``.tflite`` file wrong, slow or large, without running it.

    Also for faults of files made by other tools. On ARM, and all CPUs without AVX, XNNPACK
    computes 1x1 convolutions on sparse weights fast if the whole network suits it; the report
    says whether this one does, and which op is in the way.

    Args:
        model: a ``.tflite`` file, as a path or bytes; or a built Keras 3 model, which stands for
            the file that `export_tflite` would make of it.

    Returns:
        A `LintReport`.

    Raises:
        TypeError: ``model`` is neither.
        ValueError: an unbuilt model, or a file that is no ``.tflite`` file.
        OSError: a path that cannot be read.
        ImportError: the packages of ``keras_dst[export]`` are missing.
        ExportError: the model could not be converted.

    Example:
        >>> keras_dst.lint("model.tflite").errors
        []
    """
    if isinstance(model, bytes | str | os.PathLike):
        check_installed("ai_edge_litert", "flatbuffers")
        from keras_dst.export.decode import load, whole
        from keras_dst.export.rules import check

        name = "the bytes given" if isinstance(model, bytes) else Path(model).name
        content = load(model)
        with whole(name):
            return check(name, content)
    check_exportable(model)
    check_installed("tensorflow", "ai_edge_litert", "flatbuffers")
    from keras_dst.export.choose import choose
    from keras_dst.export.convert import to_tflite
    from keras_dst.export.rules import check

    return check(model.name, choose(to_tflite(model)).content)
