"""`selection_profile`: the profile of one model, or of two Fishers alone."""

from __future__ import annotations

from collections.abc import Sequence

from .dag import ForgetRequest, InheritanceDAG, Model
from .fisher import Fisher
from .plan import plan
from .profile import SelectionProfile, profiles_of
from .ratios import check_fishers, ratios_of


def selection_profile(
    original: Fisher,
    forget: Fisher | Sequence[Fisher],
    model: Model | None = None,
    merge: str = "max",
    scale: float = 1.0,
    backend: str | None = None,
) -> SelectionProfile:
    """One pass over two Fishers: how many elements any alpha would select, and with a model what norm would go.

    Args:
        original: Fisher I over the data the model was trained on.
        forget: Fisher F over the data to be forgotten; several are merged on the fly.
        model: whose parameters the Fishers belong to; for `removed` only, and costs a second pass in plain torch.
        merge, scale: as in `plan`.
        backend: name of one; None for the default.

    Raises:
        ArgumentError, LayoutError, DTypeError, DeviceError, BackendError: as `adaptive_alpha`.

    """
    if model is None:
        return profiles_of(ratios_of(original, forget, merge, scale, backend), [original.layout.numel])[0]
    dag = InheritanceDAG()
    dag.add_model("model", model, original)
    requests = [ForgetRequest("model", fisher) for fisher in check_fishers(original, forget)]
    return plan(dag, requests, merge=merge, scale=scale, backend=backend).profile(norms=True)["model"]
