"""Forget one class of what a LoRA adapter has learned; the base that it shares with others stays as it is.

A BERT learns twelve topics of made-up text and is frozen. An adapter and a new head (peft) learn to put the topics on
six shelves. These are what ff.estimate_fisher takes by default: all that requires grad. One shelf is forgotten.
Needs transformers and peft: pip install '.[models]'
"""

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import fiun_fast as ff

TOPICS, SHELVES, FORGET, LENGTH = 12, 6, 4, 12
COMMON, OWN = 40, 8  # words that all topics use, and of each topic


def write(topic, label):
    """A text: eight words that all topics use and four of the topic's own, in any order."""
    words = torch.cat([torch.randint(COMMON, (8,)), COMMON + topic * OWN + torch.randint(OWN, (4,))])
    return {"input_ids": words[torch.randperm(LENGTH)], "labels": torch.tensor(label)}


def fit(model, texts, lr, epochs):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(epochs):
        for batch in DataLoader(texts, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    model.eval()


def main(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(**sizes, vocab_size=COMMON + TOPICS * OWN, max_position_embeddings=LENGTH, num_labels=TOPICS)
    bert = BertForSequenceClassification(config)
    fit(bert, [write(n % TOPICS, n % TOPICS) for n in range(800)], lr=3e-3, epochs=4)
    bert.classifier, bert.num_labels = torch.nn.Linear(32, SHELVES), SHELVES
    lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["query", "value", "dense"])
    model = get_peft_model(bert, lora)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    train, validation, test = ([write(n % TOPICS, n % SHELVES) for n in range(size)] for size in (480, 240, 240))
    fit(model, train, lr=1e-2, epochs=3)

    @torch.no_grad()
    def look(texts):  # accuracy on the shelf and on the others, and how probable the shelf is thought to be there
        batch = next(iter(DataLoader(texts, batch_size=len(texts))))
        labels, odds = batch["labels"], model(input_ids=batch["input_ids"]).logits.softmax(1)
        own, right = labels == FORGET, (odds.argmax(1) == labels).float()
        return right[own].mean().item(), right[~own].mean().item(), odds[own, FORGET].mean().item()

    original = ff.estimate_fisher(model, DataLoader(train, batch_size=32), estimator="expected")
    shelf = DataLoader([text for text in train if text["labels"] == FORGET], batch_size=32)
    forget = ff.estimate_fisher(model, shelf, estimator="expected")
    dag = ff.InheritanceDAG()
    dag.add_model("adapter", model, fisher=original)
    plan = ff.plan(dag, requests := [ff.ForgetRequest("adapter", forget)])

    def score(name, model):
        left, kept, odds = look(validation)
        return kept - left - 0.1 * odds

    before = look(test)
    plan.set_values_(ff.tune(dag, requests, score, points=16))
    print(plan.run_())
    after = look(test)
    print(f"shelf {before[0]:.1%} -> {after[0]:.1%}, other shelves {before[1]:.1%} -> {after[1]:.1%} (test data)")
    same = all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    print(f"{original.numel:,} elements of the adapter could be reached; the base is {'as it was' if same else 'NOT'}")
    return {"forgotten": (before[0], after[0]), "retained": (before[1], after[1]), "base as it was": same}


if __name__ == "__main__":
    main()
