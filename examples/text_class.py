"""Forget one class of a BERT classifier: a topic of made-up text.

The head alone is dampened: the topic is no longer given as an answer; the encoder still tells it from others.
Needs transformers: pip install '.[models]'
"""

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import fiun_fast as ff

TOPICS, FORGET, LENGTH = 6, 2, 12
COMMON, OWN = 40, 8  # words that all topics use, and of each topic


def write(topic):
    """A text: eight words that all topics use and four of the topic's own, in any order."""
    words = torch.cat([torch.randint(COMMON, (8,)), COMMON + topic * OWN + torch.randint(OWN, (4,))])
    return {"input_ids": words[torch.randperm(LENGTH)], "labels": torch.tensor(topic)}


def main(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(**sizes, vocab_size=COMMON + TOPICS * OWN, max_position_embeddings=LENGTH, num_labels=TOPICS)
    model = BertForSequenceClassification(config)
    train, validation, test = ([write(n % TOPICS) for n in range(size)] for size in (600, 240, 240))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):
        for batch in DataLoader(train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    model.eval()

    @torch.no_grad()
    def look(texts):  # accuracy on the topic and on the others, and how probable the topic is thought to be there
        batch = next(iter(DataLoader(texts, batch_size=len(texts))))
        labels, odds = batch["labels"], model(batch["input_ids"]).logits.softmax(1)
        own, right = labels == FORGET, (odds.argmax(1) == labels).float()
        return right[own].mean().item(), right[~own].mean().item(), odds[own, FORGET].mean().item()

    # batches as the model takes them; "expected", since the model is very sure of its answers (docs/fishers.md)
    original = ff.estimate_fisher(model, DataLoader(train, batch_size=32), params="last", estimator="expected")
    topic = DataLoader([text for text in train if text["labels"] == FORGET], batch_size=32)
    forget = ff.estimate_fisher(model, topic, params="last", estimator="expected")
    dag = ff.InheritanceDAG()
    dag.add_model("bert", model, fisher=original)
    plan = ff.plan(dag, requests := [ff.ForgetRequest("bert", forget)])

    def score(name, model):
        left, kept, odds = look(validation)
        return kept - left - 0.1 * odds

    before = look(test)
    plan.set_values_(ff.tune(dag, requests, score, points=16))
    print(plan.run_())
    after = look(test)
    print(f"topic {before[0]:.1%} -> {after[0]:.1%}, other topics {before[1]:.1%} -> {after[1]:.1%} (test data)")
    return {"forgotten": (before[0], after[0]), "retained": (before[1], after[1])}


if __name__ == "__main__":
    main()
