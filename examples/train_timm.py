"""Train a timm model with the selective loss; started again, it goes on at the next sample."""

import argparse
import os

import timm
import torch
from torch.utils.data import DataLoader

import vlal_dist as vlal

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("root", help="dataset that merge wrote")
parser.add_argument("checkpoint", help="file, written every --save batches")
for name, value in {"epochs": 12, "batch": 64, "size": 224, "ignore": 30, "save": 100}.items():
    parser.add_argument(f"--{name}", type=int, default=value)
args = parser.parse_args()

stream = vlal.ShardStream(args.root, batch_size=args.batch, image_size=args.size)
loss = vlal.SelectiveLoss(args.ignore, feasible=stream.feasible, reduction="sum")
model = timm.create_model("resnet18", num_classes=len(stream.attributes))
groups = [{"params": p, "weight_decay": 1e-4 if p.ndim > 1 else 0} for p in model.parameters()]
optimizer = torch.optim.Adam(groups, lr=7e-4)
parts = {"model": model, "optimizer": optimizer, "stream": stream}
if os.path.exists(args.checkpoint):
    for name, state in torch.load(args.checkpoint, weights_only=True).items():
        parts[name].load_state_dict(state)
for epoch in range(stream.epoch, args.epochs):
    stream.set_epoch(epoch)
    for batch in DataLoader(stream, batch_size=None, num_workers=2):
        keys = {name: batch[name] for name in ("object_id", "likelihood", "sample_id", "epoch")}
        value = loss(model(batch["image"] * (1 / 255)), batch["labels"], **keys)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        print(f"{batch['position'].tolist()} loss {value.item() / args.batch:.7f}", flush=True)
        if batch["position"][1] // args.batch % args.save == 0:
            states = [model.state_dict(), optimizer.state_dict(), stream.state_dict(batch)]
            torch.save(dict(zip(parts, states, strict=True)), f"{args.checkpoint}.new")
            os.replace(f"{args.checkpoint}.new", args.checkpoint)
