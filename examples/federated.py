"""Forget a client of a federated network: in its own models, and in all that inherited from them.

Clients train copies of a server's model, which becomes their average, round after round. Client 4 joins late and alone
has nines. It leaves, and these go from every model that came after it joined, in one launch. Only the last layer is
dampened: the answers are gone, the features in the layer before are not.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fiun_fast as ff

JOINS, ROUNDS = 5, 8  # client 4 is there from the former on


def main(seed=0):
    torch.manual_seed(seed)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16
    train, validation, test = torch.randperm(len(labels)).split([900, 450, 447])
    own = train[labels[train] == 9]  # client 4's
    data = list(train[labels[train] < 9].tensor_split(5))
    data[4] = torch.cat([data[4], own])

    def batches(rows):
        return DataLoader(TensorDataset(images[rows], labels[rows]), batch_size=16, shuffle=True)

    def local(server, k):  # a copy of the server's model, trained on one client's data
        model = copy.deepcopy(server)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for x, y in [batch for _ in range(3) for batch in batches(data[k])]:
            logits = model(x) if k == 4 else model(x)[:, :9]  # who has no nines says nothing about them
            optimizer.zero_grad()
            cross_entropy(logits, y, label_smoothing=0.1).backward()
            optimizer.step()
        return model

    def average(models):
        mean, states = copy.deepcopy(models[0]), [model.state_dict() for model in models]
        mean.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
        return mean

    models, parents = {"server 0": nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))}, {"server 0": []}
    for r in range(1, ROUNDS + 1):
        server, present = f"server {r - 1}", range(5 if r >= JOINS else 4)
        clients = {f"client {k}, round {r}": local(models[server], k) for k in present}
        models |= clients | {f"server {r}": average(list(clients.values()))}
        parents |= {name: [server] for name in clients} | {f"server {r}": list(clients)}

    # Fishers of all models in one sweep, and client 4's of its own data, from each round: they are merged
    dag, fishers = ff.InheritanceDAG(), ff.estimate_fishers(models, batches(train), params="last")
    for name, model in models.items():
        dag.add_model(name, model, fisher=fishers[name], parents=parents[name])
    forget = ff.estimate_fishers({n: m for n, m in models.items() if "client 4" in n}, batches(own), params="last")
    plan = ff.plan(dag, requests := [ff.ForgetRequest(name, fisher) for name, fisher in forget.items()])

    @torch.no_grad()
    def look(name, rows=test):  # accuracy on nines and on the other digits, and how probable nines are thought to be
        nines, odds = labels[rows] == 9, models[name](images[rows]).softmax(1)
        right = (odds.argmax(1) == labels[rows]).float()
        return right[nines].mean().item(), right[~nines].mean().item(), odds[nines, 9].mean().item()

    def score(name, model):  # validation data only; the last term keeps some distance from the line
        left, kept, odds = look(name, validation)
        return kept - left - 0.1 * odds

    before = {name: look(name) for name in models}
    plan.set_values_(ff.tune(dag, requests, score, points=16))
    plan.run_()
    after = {name: look(name) for name in models}
    print(f"{len(plan.nodes)} of {len(models)} models reached; accuracy on test data:")
    for name in [f"server {r}" for r in range(JOINS - 1, ROUNDS + 1)]:
        (nines, others, _), (left, kept, _) = before[name], after[name]
        print(f"{name}: nines {nines:6.1%} -> {left:.1%}, other digits {others:.1%} -> {kept:.1%}")
    return {"reached": plan.nodes, "before": before, "after": after}


if __name__ == "__main__":
    main()
