"""Forget one class of an image model: the threes among scikit-learn's handwritten digits.

timm's ConvNeXt where timm can be imported, else a small net of the same shape. Only the last layer is dampened: the
class is no longer given as an answer, but what tells a three from other digits is still in the layers before.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, gelu
from torch.utils.data import DataLoader, TensorDataset

import fiun_fast as ff

FORGET = 3


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.GroupNorm(1, width)
        self.up, self.down = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)

    def forward(self, x):
        return x + self.down(gelu(self.up(self.norm(self.depthwise(x)))))


def network():
    try:
        from timm.models.convnext import ConvNeXt
    except (ImportError, RuntimeError):  # not there, or its torchvision does not fit torch
        body = nn.Conv2d(1, 16, 2, 2), Block(16), nn.Conv2d(16, 32, 2, 2), Block(32)
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 10))
    return ConvNeXt(
        in_chans=1, num_classes=10, patch_size=1, depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), ls_init_value=None
    )


def main(seed=0):
    torch.manual_seed(seed)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    train, validation, test = torch.randperm(len(labels)).split([900, 450, 447])

    def batches(rows, size=16):
        return DataLoader(TensorDataset(images[rows], labels[rows]), batch_size=size, shuffle=True)

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for x, y in [batch for _ in range(15) for batch in batches(train, 64)]:
        optimizer.zero_grad()
        cross_entropy(model(x), y, label_smoothing=0.1).backward()
        optimizer.step()

    @torch.no_grad()
    def look(rows):  # accuracy on the threes and on the rest, and how probable threes are thought to be
        threes, odds = labels[rows] == FORGET, model(images[rows]).softmax(1)
        right = (odds.argmax(1) == labels[rows]).float()
        return right[threes].mean().item(), right[~threes].mean().item(), odds[threes, FORGET].mean().item()

    # how much each weight of the last layer matters to everything, and to the threes
    original = ff.estimate_fisher(model, batches(train), params="last")
    forget = ff.estimate_fisher(model, batches(train[labels[train] == FORGET]), params="last")
    dag = ff.InheritanceDAG()  # of one model
    dag.add_model("net", model, fisher=original)
    plan = ff.plan(dag, requests := [ff.ForgetRequest("net", forget)])

    def score(name, model):  # validation data only; the last term keeps some distance from the line
        left, kept, odds = look(validation)
        return kept - left - 0.1 * odds

    before = look(test)
    plan.set_values_(ff.tune(dag, requests, score, points=16))  # alpha and lambda
    print(plan.run_())
    after = look(test)
    print(f"threes {before[0]:.1%} -> {after[0]:.1%}, other digits {before[1]:.1%} -> {after[1]:.1%} (test data)")
    return {"forgotten": (before[0], after[0]), "retained": (before[1], after[1])}


if __name__ == "__main__":
    main()
