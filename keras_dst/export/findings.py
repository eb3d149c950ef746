"""Findings of `lint`, and the report that lists them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from keras_dst._reporting.tables import as_paragraph


@dataclass(frozen=True)
class Finding:
    """One problem that `lint` found in a model or file, and how to fix it.

    Attributes:
        level: ``"error"`` if some CPU computes wrong results, or a runtime refuses the file.
            ``"advice"`` if the file is larger or slower than necessary.
        rule: Name of the rule.
        where: Name of the op or tensor in which the problem was found.
        found: Text that describes the problem and its effect.
        fix: Text that says how to fix the problem.
    """

    level: Literal["error", "advice"]
    rule: str
    where: str
    found: str
    fix: str

    def __str__(self) -> str:
        found = as_paragraph(f"{self.level}: {self.where}: {self.found} [{self.rule}]", indent=2)
        return f"{found}\n{as_paragraph(f'  Fix: {self.fix}', indent=4)}"


@dataclass(frozen=True)
class LintReport:
    """Findings of `lint` in one file or model. `str()` returns the findings as text, with errors
    before advice.

    Attributes:
        name: Name of the file or of the model.
        sparse_inference: Whether XNNPACK runs the model with sparse kernels on CPUs without AVX.
        reason: Text that says how many ops run with sparse kernels, or why no op runs with sparse
            kernels.
        findings: All findings. Errors come before advice.
        target: ``"micro"`` or the Ethos-U NPU for which the file was checked, or None for CPUs. For
            microcontrollers and NPUs, the report says nothing about XNNPACK.

    Example:
        >>> print(keras_dst.lint("model.tflite"))
    """

    name: str
    sparse_inference: bool
    reason: str
    findings: list[Finding]
    target: str | None = None

    @property
    def errors(self) -> list[Finding]:
        """Findings of level ``"error"``."""
        return [finding for finding in self.findings if finding.level == "error"]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict that can be written as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        answer = "yes" if self.sparse_inference else "no"
        advice = len(self.findings) - len(self.errors)
        where = f" for {self.target}" if self.target else ""
        lines = [f"{self.name}{where}: errors: {len(self.errors)}, advice: {advice}"]
        if self.target is None:
            text = f"Sparse inference by XNNPACK on ARM: {answer}, {self.reason}."
            lines.append(as_paragraph(text, indent=2))
        return "\n".join(lines + [str(finding) for finding in self.findings])
