"""What people have in their repository: a class in the manner of SSD's, written here in our own words.

Parameter by parameter, one torch operation after another. `before.py` uses it.
"""

import torch
from torch import nn


class ParameterPerturber:
    """Selective Synaptic Dampening (arXiv 2308.07707)."""

    def __init__(self, model, opt, device, parameters):
        self.model, self.opt, self.device = model, opt, device
        self.alpha, self.lam = parameters["selection_weighting"], parameters["dampening_constant"]
        self.exponent, self.cap = parameters["exponent"], parameters["lower_bound"]

    def calc_importance(self, dataloader):
        """Mean over the batches of each parameter's squared gradient."""
        criterion = nn.CrossEntropyLoss()
        importances = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        for x, _, y in dataloader:
            self.opt.zero_grad()
            criterion(self.model(x.to(self.device)), y.to(self.device)).backward()
            for name, p in self.model.named_parameters():
                if p.grad is not None:
                    importances[name] += p.grad.clone().pow(2)
        for importance in importances.values():
            importance /= float(len(dataloader))
        return importances

    @torch.no_grad()
    def modify_weight(self, original, forget):
        """Shrink the parameters that matter more to the forget data."""
        for name, p in self.model.named_parameters():
            selected = torch.where(forget[name] > original[name].mul(self.alpha))
            factor = original[name].mul(self.lam).div(forget[name]).pow(self.exponent)[selected]
            factor[torch.where(factor > self.cap)] = self.cap
            p[selected] = p[selected].mul(factor)
