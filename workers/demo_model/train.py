"""Trains the demo model on CPU, with one process per core:

    python -m torch.distributed.run --nproc-per-node 2 -m workers.demo_model.train --minutes 60 --out OUT

Muon moves the matrices and AdamW the rest; an exponential average of the weights is what is measured and exported.
Every few minutes it writes a checkpoint and an export of the average to OUT, with the held-out accuracy per skill.
"""

import argparse
import json
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as distributed
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from . import weights_path
from .exchanges import Limits
from .train_batches import IGNORED, RowSource, encoded
from .train_network import END_OF_TURN, Llama, Shape, save_weights
from .world import MAKERS, Recipe, assemble, draw, draw_with_tools, system_prompt

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
LIMITS = Limits(line_tokens=62, count_span=60)


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train. Rates rise, stay, and fall to a tenth over the last part."""

    minutes: float
    matrix_rate: float
    other_rate: float
    tokens_per_batch: int
    seed: int
    begin_at: float = 0.0
    warm_up: float = 0.01
    fall_from: float = 0.6
    average_decay: float = 0.997

    def rate(self, progress: float) -> float:
        """The factor on both rates at this share of the training."""
        if progress < self.warm_up:
            return max(0.02, progress / self.warm_up)
        if progress < self.fall_from:
            return 1.0
        return 1.0 - 0.95 * min(1.0, (progress - self.fall_from) / (1.0 - self.fall_from))


class Optimizers:
    """Muon for the layers' matrices, AdamW for embeddings and norms, and one rate schedule for both."""

    def __init__(self, model: Llama, plan: Plan) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        muon = torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.pairs = ((muon, plan.matrix_rate), (adam, plan.other_rate))

    def step(self, factor: float) -> None:
        """Move the weights and clear the gradients."""
        for optimizer, rate in self.pairs:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class Peers:
    """The processes that train together: each draws its own rows, and all take the mean step."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.count > 1:
            distributed.init_process_group("gloo")

    def mean(self, parameters: list[nn.Parameter], *values: float) -> list[float]:
        """Average the gradients in place, and return the average of the values."""
        if self.count == 1:
            return list(values)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor(values)])
        distributed.all_reduce(flat)
        flat /= self.count
        sizes = [gradient.numel() for gradient in gradients]
        *parts, means = flat.split([*sizes, len(values)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return means.tolist()


def loss_of(model: Llama, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the learned tokens."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(tokens)
        chosen = labels != IGNORED
        logits = model.logits(hidden[chosen])
    return functional.cross_entropy(logits.float(), labels[chosen])


@torch.no_grad()
def exact_share(model: Llama, tokenizer: Tokenizer, skill: str, samples: int) -> float:
    """Held-out answers of which greedy decoding would get every token, by one forward pass each."""
    rng = random.Random(4242)
    right = 0
    for _ in range(samples):
        if skill == "tool":
            exchange, tools = draw_with_tools(rng, "held_out")
        else:
            exchange, tools = draw(lambda: MAKERS[skill](rng, LIMITS), "held_out"), ()
        drawn = assemble([exchange], tools, system_prompt(rng, Recipe()), "no", rng)
        ids, learned = encoded(tokenizer, drawn)
        tokens = torch.tensor(ids)
        best = model.logits(model(tokens[None, :-1])[0]).argmax(-1)
        right += bool(((best == tokens[1:]) | ~torch.tensor(learned[1:])).all())
    return right / samples


def export(average: dict[str, Tensor], shape: Shape, tokenizer: Tokenizer, source: Path, folder: Path) -> None:
    """Write the averaged weights as a complete Hugging Face folder."""
    ids = tokenizer.token_to_id(END_OF_TURN), tokenizer.token_to_id("<|endoftext|>")
    save_weights(average, shape, *ids, folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)


class Trainer:
    """One training run: model, average, optimizers, rows and clock."""

    def __init__(self, plan: Plan, tokenizer_folder: Path, out: Path, start: Path | None) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.out, self.tokenizer_folder = plan, out, tokenizer_folder
        self.tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        self.model = Llama(Shape(vocab_size=self.tokenizer.get_vocab_size()))
        if start is not None:
            self.model.load_state_dict(torch.load(start)["average"])
        self.averaged = Llama(self.model.shape)
        self.averaged.load_state_dict(self.model.state_dict())
        self.optimizers = Optimizers(self.model, plan)
        self.peers = Peers()
        own_seed = plan.seed + 1000 * self.peers.rank
        self.rows = RowSource(self.tokenizer, own_seed, plan.tokens_per_batch // self.peers.count)
        self.steps = 0
        self.started = time.monotonic()

    def progress(self) -> float:
        """The share of the training that is over."""
        elapsed = (time.monotonic() - self.started) / (60 * self.plan.minutes)
        return self.plan.begin_at + (1 - self.plan.begin_at) * elapsed

    def step(self, progress: float) -> tuple[float, float]:
        """One batch; returns its loss and the progress that all processes agree on."""
        loss = loss_of(self.model, *self.rows.batch(progress))
        loss.backward()
        parameters = list(self.model.parameters())
        mean_loss, reached = self.peers.mean(parameters, loss.item(), self.progress())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizers.step(self.plan.rate(progress))
        self.steps += 1
        self.follow()
        return mean_loss, reached

    @torch.no_grad()
    def follow(self) -> None:
        """Let the average follow the weights, quickly at first."""
        decay = min(self.plan.average_decay, (1 + self.steps) / (10 + self.steps))
        for mean, weight in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)

    def report(self, losses: list[float], samples: int) -> None:
        """Print loss and held-out accuracy, and write checkpoint and export."""
        self.averaged.eval()
        shares = {skill: exact_share(self.averaged, self.tokenizer, skill, samples) for skill in (*MAKERS, "tool")}
        line = {"minutes": round((time.monotonic() - self.started) / 60, 1), "steps": self.steps}
        line["loss"] = round(sum(losses) / max(1, len(losses)), 4)
        print(json.dumps(line | {name: round(share, 3) for name, share in shares.items()}), flush=True)
        torch.save(
            {"model": self.model.state_dict(), "average": self.averaged.state_dict()}, self.out / "checkpoint.pt"
        )
        export(self.averaged.state_dict(), self.model.shape, self.tokenizer, self.tokenizer_folder, self.out / "export")

    def run(self, report_every_s: float) -> None:
        """Train until the time is over; the first process reports."""
        losses: list[float] = []
        due = self.started + report_every_s
        progress = self.plan.begin_at
        while progress < 1.0:
            loss, progress = self.step(progress)
            losses.append(loss)
            if self.peers.rank == 0 and time.monotonic() > due:
                self.report(losses, 40)
                losses, due = [], time.monotonic() + report_every_s
        if self.peers.rank == 0:
            self.report(losses, 200)


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--matrix-rate", type=float, default=6e-3)
    parser.add_argument("--other-rate", type=float, default=3e-3)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report-every-s", type=float, default=240.0)
    parser.add_argument("--tokenizer", type=Path, default=weights_path())
    parser.add_argument("--resume", type=Path, help="a checkpoint.pt whose average to begin from")
    parser.add_argument("--begin-at", type=float, default=0.0, help="the share of the schedule to skip")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        options.minutes,
        options.matrix_rate,
        options.other_rate,
        options.tokens_per_batch,
        options.seed,
        options.begin_at,
    )
    Trainer(plan, options.tokenizer, options.out, options.resume).run(options.report_every_s)


if __name__ == "__main__":
    main()
