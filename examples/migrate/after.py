"""Forget the threes among handwritten digits, with the drop-in. `before.py` differs in one import."""

import hashlib

import torch
from sklearn.datasets import load_digits
from fiun_fast.compat.ssd import ParameterPerturber
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train(model: nn.Module, loader: DataLoader, epochs: int) -> torch.optim.Optimizer:
    """Cross entropy, SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for x, _, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return optimizer


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
conv = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
model = nn.Sequential(conv, nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
everything = TensorDataset(x, y // 5, y)  # SSD's data sets have three parts: image, coarse label, label
threes = TensorDataset(x[y == 3], y[y == 3] // 5, y[y == 3])
optimizer = train(model, DataLoader(everything, batch_size=64, shuffle=True), epochs=10)
model.eval()
print(f"before: threes {accuracy(model, x[y == 3], y[y == 3]):.1%}, others {accuracy(model, x[y != 3], y[y != 3]):.1%}")

parameters = {
    "lower_bound": 1,
    "exponent": 1,
    "magnitude_diff": None,
    "min_layer": -1,
    "max_layer": -1,
    "forget_threshold": 1,
    "dampening_constant": 1,
    "selection_weighting": 3,
}
pdr = ParameterPerturber(model, optimizer, "cpu", parameters)
forget_importance = pdr.calc_importance(DataLoader(threes, batch_size=64))
original_importance = pdr.calc_importance(DataLoader(everything, batch_size=64))
pdr.modify_weight(original_importance, forget_importance)

print(f"after:  threes {accuracy(model, x[y == 3], y[y == 3]):.1%}, others {accuracy(model, x[y != 3], y[y != 3]):.1%}")
weights = b"".join(p.detach().numpy().tobytes() for p in model.state_dict().values())
print(f"SHA-256 of the weights: {hashlib.sha256(weights).hexdigest()}")
