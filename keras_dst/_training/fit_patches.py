"""Replacement of attributes of a model while `fit` runs, and their restoration after `fit` ends.

Keras calls no hook when `fit` raises an exception. However, Keras's `fit` keeps the logs of the
last training step in a local variable. The training step is therefore patched, so that its logs
hold a reference to a small object, the token. Python frees the logs and the token when `fit`
returns or raises an exception. A finalizer of the token then restores the attributes of the model.
While an exception from `fit` is handled, its traceback keeps the local variables of `fit` alive.
The patched methods therefore stay on the model until Python frees the exception. The patched
methods behave like the original methods, except that files are written atomically.
"""

from __future__ import annotations

import functools
import inspect
import pathlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras

from keras_dst import _keras
from keras_dst._backend import malloc
from keras_dst._utils.files import atomic_write

_ATTRIBUTE = "_keras_dst_fit"


def active_fit(model) -> ActiveFit:
    """Return the `ActiveFit` that all callbacks of the running `fit` share. The function creates an
    `ActiveFit` if the `fit` has none yet."""
    # Every `fit` creates a History object. A custom training loop may have no History object.
    owner = vars(getattr(model, "history", None) or model)
    if not owner.get(_ATTRIBUTE):
        owner[_ATTRIBUTE] = ActiveFit(model)
    return owner[_ATTRIBUTE]


class _Patch(NamedTuple):
    """Patch that replaces the attribute `name` of `owner`. The function `make` maps the current
    value of the attribute to the new value."""

    owner: Any
    name: str
    make: Callable[[Any], Any]


class ActiveFit:
    """State of a running `fit`: patched attributes of the model, and the number of batches to skip.

    `bool(active_fit)` is False after `fit` has ended or was interrupted.

    If `fit` trains the model, the patches are applied at the first training step. An exception
    before the first training step leaves the model unchanged. In a custom training loop, the
    patches are applied when the first epoch begins. The original attributes are restored when
    training ends. If an error interrupts training, the attributes are restored at the latest when
    the next training begins.

    Attributes:
        skipped_batches: Number of batches that the first epoch draws without training on them.
    """

    def __init__(self, model):
        self.model = model
        self.history = getattr(model, "history", None)
        self.skipped_batches = 0
        self.keeps_memory = False
        self._to_skip = 0
        self._ended = False
        self._interrupted = False
        self._drivers: Sequence[Any] = ()
        self._patches: list[_Patch] = []
        self._applied: list[tuple[_Patch, Any, dict]] | None = None
        self._token: Callable[[], Any] = lambda: None
        # `fit` compiles a step and creates an empty history before it calls the callbacks.
        compiled = getattr(model, "train_function", None) is not None
        self._is_fit = compiled and self.history is not None and not self.history.history

    def __bool__(self):
        if self._ended or self._interrupted:
            return False
        # Every `fit` creates a new History object, also after an interrupted `fit`.
        return getattr(self.model, "history", None) is self.history

    def replace(self, owner, name: str, make: Callable[[Any], Any]) -> None:
        """Replace an attribute of an object from the first training step until `fit` ends.

        Args:
            owner: Object that has the attribute, such as the model.
            name: Name of the attribute.
            make: Function that maps the current value of the attribute to its replacement.
        """
        self._patches.append(_Patch(owner, name, make))

    def guard_step(self, drivers: Sequence[Any] = ()) -> None:
        """Patch the compiled training step.

        Later calls of `fit` do not compile the training step again, because the patched step stays
        in `model.train_function`. The patched step raises an error if one of the `drivers` needs a
        callback that is not active.
        """
        self._drivers = [*self._drivers, *drivers]
        if self.model.train_function is None:  # A custom training loop, not `fit`, is running.
            return
        # Remove the patches that earlier calls of `fit` applied, but keep the wrapper of
        # torch.compile.
        step = inspect.unwrap(self.model.train_function, stop=lambda f: not _is_patched(f))

        @functools.wraps(step, assigned=(), updated=())
        def patched_step(*arguments):
            return self._step(step, arguments)

        vars(patched_step)[_ATTRIBUTE] = True
        self.model.train_function = patched_step

    def begin_step(self) -> None:
        """State that `fit` is running. On PyTorch, Keras deletes the token before every epoch."""
        self._interrupted = False

    def begin_epoch(self) -> None:
        """Apply the patches, but only in a custom training loop. In `fit`, the first training step
        applies the patches."""
        if not self._is_fit:
            self._apply()

    def skip(self, batches: int) -> None:
        """Draw `batches` batches from the data without training on them."""
        self._to_skip = batches
        self.guard_step()

    @property
    def is_patched(self) -> bool:
        """True if a callback has registered a patch for this `fit`.

        The property ignores a training step that is patched only to skip batches.
        """
        return bool(self._patches or self._drivers)

    def restore(self) -> None:
        """Restore the original attributes of all patched objects. If `fit` is still running, its
        next training step applies the patches again."""
        applied, self._applied = self._applied, None
        for patch, replacement, before in reversed(applied or ()):
            own = vars(patch.owner)
            if own.get(patch.name) is replacement:
                del own[patch.name]
                own.update(before)
        if applied is not None and self.keeps_memory:
            malloc.return_freed_memory()

    def end(self) -> None:
        """Undo the patches permanently."""
        self._ended = True
        self.restore()
        vars(self.history or self.model).pop(_ATTRIBUTE, None)

    def _leave(self) -> None:
        """Restore the original attributes after `fit` was interrupted."""
        self.restore()
        self._interrupted = self._is_fit and any(d.active for d in self._drivers)

    def _apply(self) -> None:
        if self._applied is not None:
            return
        self._applied = []
        for patch in self._patches:
            own = vars(patch.owner)
            before = {patch.name: own[patch.name]} if patch.name in own else {}
            own[patch.name] = replacement = patch.make(getattr(patch.owner, patch.name))
            self._applied.append((patch, replacement, before))
        if self.keeps_memory:
            malloc.keep_freed_memory()

    def _step(self, step, arguments):
        if self and self._to_skip > 0:
            return self._skip_step(step, arguments)
        if self._interrupted and self._drivers and not any(d.needs_callback for d in self._drivers):
            # `fit` was interrupted, and a training loop without callbacks calls this step. The
            # compiled step does not update the masks, because the callback updated the masks.
            self.model.make_train_function(force=True)
            return self.model.train_function(*arguments)
        if idle := [d for d in self._drivers if d.schedule is not None and not d.active]:
            _keras.restore_jax_state(self.model, *arguments)
            callback = idle[0].method.driver
            raise ValueError(
                "The model was compiled for training with the "
                f"{callback.split('.')[-1]} callback. Fit with callbacks=[{callback}()]."
            )
        if not self:  # The running `fit` has no keras_dst callback.
            return step(*arguments)
        try:
            self._apply()
            result = step(*arguments)
        except BaseException:
            self._leave()
            raise
        # On JAX, a training step returns a tuple of the logs and the state.
        if isinstance(result, tuple):
            return self._with_token(result[0]), *result[1:]
        return self._with_token(result)

    def _with_token(self, logs):
        """Return a copy of the logs of a training step, with a `_Token` as an attribute.

        When `fit` ends, Python deletes the logs and the token. The token has a finalizer, which
        then restores the original attributes of the model.
        """
        if not isinstance(logs, dict):
            return logs
        token = self._token()
        if token is None:
            token = _Token()
            self._token = weakref.ref(token)
            weakref.finalize(token, self._leave).atexit = False
        logs = _Logs(logs)
        logs.token = token
        return logs

    def _skip_step(self, step, arguments):
        steps = self.model.steps_per_execution
        # On torch, `fit` has already drawn the batch from the data.
        if keras.backend.backend() != "torch":
            for _ in range(steps):
                next(arguments[-1])
        self._to_skip -= steps
        if self._to_skip <= 0 and not self.is_patched:
            self.model.train_function = step
        return {} if len(arguments) == 1 else ({}, arguments[0])


class _Token:
    """Empty object that is referenced only by the logs of training steps. Python therefore deletes
    the object together with the logs."""


class _Logs(dict):
    """Dict with the logs of a training step, and with an attribute that holds a `_Token`."""

    token: _Token


def _is_patched(step) -> bool:
    return _ATTRIBUTE in getattr(step, "__dict__", ())


class AtomicSave:
    """Replacement of a model's `save` or `save_weights` that writes local files atomically.

    Keras overwrites an existing file in place. If the process is killed during the write, the
    old file is lost and the new file is incomplete.

    Args:
        inner: Original `save` or `save_weights` method.
        prepare: Function to call before the file is written.
    """

    def __init__(self, inner, prepare: Callable[[], None]):
        self.inner, self.prepare = inner, prepare

    def __call__(self, filepath, overwrite=True, **kwargs):
        self.prepare()
        if kwargs or not overwrite or "://" in str(filepath):
            return self.inner(filepath, overwrite=overwrite, **kwargs)
        with atomic_write(pathlib.Path(filepath)) as unfinished:
            return self.inner(unfinished, overwrite=True)
