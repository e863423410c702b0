"""Fine-tune with a training loop of your own: one call puts the kernels into the model.

    python examples/own_loop.py                            # a small random model, on any machine
    python examples/own_loop.py --model Qwen/Qwen3-0.6B    # downloads the model

The loop accumulates gradients over two micro-batches and divides by the labels of both, as transformers' Trainer does.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from liger_trainer import apply_liger, revert_liger

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="hub name or path")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--tokens", type=int, default=64, help="tokens in a row")
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
else:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0,
        )
    )  # fmt: skip
model.to(device).train()

report = apply_liger(model)
print(report)

# Your rows come here: ids, a mask of their padding, and labels, -100 where there is no loss. One row is shorter.
input_ids = torch.randint(1, 512, (4, args.tokens), device=device)
attention_mask = torch.ones_like(input_ids)
attention_mask[1, args.tokens // 2 :] = 0
labels = input_ids.masked_fill(attention_mask == 0, -100)
labels[:, : args.tokens // 4] = -100  # the prompt

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
num_items = (labels[:, 1:] != -100).sum()
losses = []
for step in range(args.steps):
    loss = 0.0
    for rows in (slice(0, 2), slice(2, 4)):
        outputs = model(
            input_ids=input_ids[rows],
            attention_mask=attention_mask[rows],
            labels=labels[rows],
            num_items_in_batch=num_items,  # of the whole step, so that the micro-batches' losses add up
        )
        outputs.loss.backward()
        loss += outputs.loss.item()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss)
    if step % 5 == 0 or step == args.steps - 1:
        print(f"step {step:>3}  loss {loss:.4f}")

revert_liger(model)  # the model computes exactly what it did before; keep the kernels if you go on training
