"""Every error raised on purpose, of one base class and beside it the built-in type that fits; and the warnings."""

from __future__ import annotations

import sys
import warnings


class FiunError(Exception):
    """Base of all errors of this package. A call that raises one has changed nothing."""


class ArgumentError(FiunError, ValueError):
    """A number or option outside its range: a negative alpha, an unknown merge, an empty list of requests."""


class LayoutError(FiunError, ValueError):
    """Names or shapes that do not fit together, or memory that is not contiguous or overlaps."""


class DTypeError(FiunError, TypeError):
    """A tensor of a dtype that the operation does not take."""


class DeviceError(FiunError, ValueError):
    """Tensors that belong together lie on different devices, or a backend cannot reach them."""


class DagError(FiunError, ValueError):
    """A graph that is not an inheritance DAG: unknown parent, duplicate name, cycle, time that runs backwards."""


class FisherFileError(FiunError, ValueError):
    """A file that is not a (whole) Fisher written by this package."""


class FileWriteError(FiunError, OSError):
    """A file cannot be written: no such folder, no permission, a full disk. What was there before is still there."""


class TreeFileError(FiunError, ValueError):
    """A TOML file that does not describe a family of models on disk; the message names table and key."""


class CheckpointError(FiunError, ValueError):
    """Models, Fishers or a journal on disk that are damaged, of a form that is not read, in use, or have changed."""


class BackendError(FiunError, RuntimeError):
    """A backend that is unknown, or known and not usable here."""


class EstimationError(FiunError, ValueError):
    """A Fisher cannot be estimated, or a model not evaluated.

    An empty loader, a batch of an unknown form, a loss without a gradient, outputs that are not finite.
    """


class MissingPackageError(FiunError, ImportError):
    """Something needs a package that is not installed; the message has the line for pip."""


class UndoError(FiunError, RuntimeError):
    """A run cannot be undone: it kept no log, was undone before, or the parameters are no longer as it left them."""


class UndoFileError(FiunError, ValueError):
    """A file that is not a (whole) undo log written by this package."""


class NotForgottenError(FiunError, RuntimeError):
    """At some node nothing that was tried forgets enough and keeps enough; the message says what was reached there."""


class DistributedError(FiunError, RuntimeError):
    """Another rank does not answer, or has met an error that is none of this package's; the message names the rank."""


class EstimationWarning(UserWarning):
    """A Fisher that was estimated is of no use: zero everywhere, or not finite."""


class ProvenanceWarning(UserWarning):
    """Fishers that are compared or merged were estimated in unlike ways.

    `warnings.simplefilter("ignore", ff.ProvenanceWarning)` silences it.
    """


class ScopeWarning(UserWarning):
    """The last layer is not what one may expect: it is frozen, or tied to another.

    `warnings.simplefilter("ignore", ff.ScopeWarning)` silences it, and so does naming the parameters.
    """


class TuningWarning(UserWarning):
    """A choice to be doubted: at the edge of its grid, no better than leaving alone, or of a search that failed."""


class FallbackWarning(UserWarning):
    """Something takes a slower way than the one that was expected; the message says what, and why.

    `warnings.simplefilter("ignore", ff.FallbackWarning)` silences it.
    """


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside this package that called it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
