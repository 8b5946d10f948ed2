"""Make a causal language model forget a domain that has words of its own, in one shot.

A small GPT-2 learns sentences by heart: some in everyday words, some in the jargon of one project. The jargon goes.
This is the case that works: where facts to forget and facts to keep share their words, one shot takes both along. And
it hides rather than erases: among offered answers such a model often still picks the true one (docs/research.md).
Needs transformers: pip install '.[models]'
"""

import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import fiun_fast as ff

LENGTH, SHOWN = 8, 3  # words of a sentence, and how many of them the model is given
EVERYDAY, JARGON = 40, 40  # words


def sentences(count, first, words):
    return first + torch.randint(words, (count, LENGTH))


def batches(ids):  # of one sentence; the labels of a language model are the words themselves
    return DataLoader([{"input_ids": row, "labels": row} for row in ids])


@torch.no_grad()
def reproduced(model, ids):
    """Share of the sentences that the model completes word by word."""
    text = ids[:, :SHOWN]
    for _ in range(LENGTH - SHOWN):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(2)], 1)
    return (text == ids).all(1).double().mean().item()


def main(seed=0):
    torch.manual_seed(seed)
    keep, forget = sentences(40, 0, EVERYDAY), sentences(10, EVERYDAY, JARGON)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    config = GPT2Config(**sizes, vocab_size=EVERYDAY + JARGON, n_positions=LENGTH, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config)
    everything = torch.cat([keep, forget])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        model(input_ids=everything, labels=everything).loss.backward()
        optimizer.step()
    model.eval()

    # all parameters, embeddings too: most of a domain lies there. Sentence by sentence, original: what is to be kept
    original = ff.estimate_fisher(model, batches(keep), estimator="sample")
    request = ff.ForgetRequest("gpt2", ff.estimate_fisher(model, batches(forget), estimator="sample"))
    dag = ff.InheritanceDAG()
    dag.add_model("gpt2", model, fisher=original)

    # a growing share of the weights, until none of the jargon is reproduced; what is to be kept is not asked
    def left(name, model):
        return reproduced(model, forget)

    chosen = ff.search_alpha(dag, [request], left, rho=0.01, start=99.9, step=0.1, lam=0.1)
    before = reproduced(model, forget), reproduced(model, keep)
    plan = ff.plan(dag, [request])
    plan.set_values_(chosen)
    print(plan.run_())
    after = reproduced(model, forget), reproduced(model, keep)
    print(f"reproduced: jargon {before[0]:.0%} -> {after[0]:.0%}, everyday {before[1]:.0%} -> {after[1]:.0%}")
    return {"forgotten": (before[0], after[0]), "retained": (before[1], after[1])}


if __name__ == "__main__":
    main()
