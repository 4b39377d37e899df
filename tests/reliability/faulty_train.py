"""`vlal_dist/train.py` with faults injected at a rank and a step, and an event log.

The environment says what happens:

    FAULTS   JSON list of {"rank", "step", "at", "kind", ...}; each happens once in a run root's
             life (`often`: at every such moment), logged before it happens
    EVENTS   folder; every process appends to a file of its own, a JSON object a line

`at`, in the order of a step:
    begin     the process has started (`clock` only)
    build     the ranks have met, DeepSpeed's engine is not made yet (`step` 0)
    start     everything is made; `step` is where they go on
    step      a batch is here, nothing was computed
    gradient  the gradient is summed, nothing was applied
    applied   the step was applied and counted
    epoch     the epoch's last step was made
    validate  before validation batch `nth`
    best      before the best model's weights are written
    save      before file `nth` of a checkpoint is written (3: COMPLETE)
`kind`:
    kill      SIGKILL to itself
    signal    `signal` to itself, `times` of them
    stop      SIGSTOP to itself (a process that hangs)
    sleep     `seconds`
    clock     its clock of the day is wrong by `offset` (`+1d`) for all of its life;
              `library` is libfaketime
    nan       the step's images become not finite (`step` only)
    nan_gradient  the gradient does (`gradient` only)
    fill      a file takes what is left of the disk of `path`
    free      that file is removed
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(ROOT)

from psutil import Process  # noqa: E402

import vlal_dist.train  # noqa: E402
from vlal_dist.training import stop  # noqa: E402

RANK = int(os.environ.get("RANK", "0"))
EVENTS = Path(os.environ["EVENTS"])
FAULTS: list[dict[str, Any]] = json.loads(os.environ.get("FAULTS", "[]"))
FILLER = "filler"


def note(event: str, **values: object) -> None:
    """Add a line to this process's event log, on disk before anything else happens."""
    line = json.dumps({"t": time.time(), "rank": RANK, "event": event, **values}) + "\n"
    with (EVENTS / f"{RANK}-{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line)


def moment(at: str, step: int, nth: int = 0, *, spoil: Callable[[], None] | None = None) -> None:
    """Do the faults of this moment."""
    for number, fault in enumerate(FAULTS):
        wanted = (fault.get("rank", RANK), fault["at"], fault.get("step", step))
        if wanted != (RANK, at, step) or fault.get("nth", nth) != nth:
            continue
        done = EVENTS / f"done-{number}-{RANK}"
        if done.exists() and not fault.get("often"):
            continue
        done.touch()
        if not fault.get("often"):
            note("fault", step=step, at=at, kind=fault["kind"], nth=nth)
        commit(fault, spoil)


def commit(fault: dict[str, Any], spoil: Callable[[], None] | None) -> None:
    kind = fault["kind"]
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "signal":
        for _ in range(fault.get("times", 1)):
            os.kill(os.getpid(), getattr(signal, fault["signal"]))
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "sleep":
        time.sleep(fault["seconds"])
    elif kind == "fill":
        fill(Path(fault["path"]))
    elif kind == "free":
        (Path(fault["path"]) / FILLER).unlink()
    else:
        assert kind in ("nan", "nan_gradient") and spoil is not None, fault
        spoil()


def fill(folder: Path) -> None:
    with (folder / FILLER).open("wb", buffering=0) as file, suppress(OSError):
        for size in (1 << 20, 1 << 12):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def install() -> None:
    """Patch the trainer, so that each moment is reported. torch is imported here."""
    import torch

    from vlal_dist.training import data, epoch_check, step, trainer, validation

    one_step, train = trainer.Trainer._train_step, trainer.Trainer.train
    accumulate, save = step.TrainStep.accumulate, trainer.save_checkpoint
    write_model, batches = validation.write_model, validation.evaluation_batches
    make_loader = data.TrainingData.make_loader
    check_epoch = epoch_check.EpochCheck.check_epoch
    now = {"step": 0}

    def faulty_train(it: Any) -> None:
        now["step"] = it.state.step
        note("start", step=it.state.step, epoch=it.state.epoch, world_size=it.ranks.world_size)
        moment("start", it.state.step)
        train(it)
        note("done", step=it.state.step)

    def faulty_loader(*rest: Any, **more: Any) -> Any:
        moment("build", 0)
        return make_loader(*rest, **more)

    def faulty_one_step(it: Any, batch: Any, **more: Any) -> bool:
        now["step"] = it.state.step

        def spoil() -> None:
            batch.micro_batches = [
                dataclasses.replace(one, image=torch.full(one.image.shape, float("nan")))
                for one in batch.micro_batches
            ]

        moment("step", it.state.step, spoil=spoil)
        stopping: bool = one_step(it, batch, **more)
        now["step"] = it.state.step
        real = [one.uid[one.row_weight > 0].tolist() for one in batch.micro_batches]
        uids = [f"{uid % 2**64:016x}" for part in real for uid in part]
        note("step", step=it.state.step, epoch=it.state.epoch, uids=uids)
        moment("applied", it.state.step)
        return stopping

    def faulty_accumulate(it: Any, *rest: Any, **more: Any) -> None:
        accumulate(it, *rest, **more)

        def spoil() -> None:
            it.engine.gradients()[0].fill_(float("nan"))

        moment("gradient", now["step"], spoil=spoil)

    def faulty_batches(*rest: Any, **more: Any) -> Iterator[Any]:
        for nth, batch in enumerate(batches(*rest, **more)):
            moment("validate", now["step"], nth)
            yield batch

    def faulty_check(it: Any, *rest: Any) -> None:
        moment("epoch", now["step"])
        check_epoch(it, *rest)

    def faulty_save(store: Any, state: Any, *rest: Any, **more: Any) -> int:
        create, nth = store.create, iter(range(100))

        def faulty_create(*words: Any) -> Any:
            moment("save", state.step, next(nth))
            return create(*words)

        store.create = faulty_create
        started = time.time()
        try:
            size: int = save(store, state, *rest, **more)
        finally:
            del store.create
        note("saved", step=state.step, seconds=time.time() - started, bytes=size)
        return size

    def faulty_best(*rest: Any, **more: Any) -> None:
        moment("best", now["step"])
        write_model(*rest, **more)

    trainer.Trainer._train_step = faulty_one_step  # type: ignore[method-assign]
    trainer.Trainer.train = faulty_train  # type: ignore[method-assign]
    data.TrainingData.make_loader = faulty_loader  # type: ignore[method-assign]
    trainer.save_checkpoint = faulty_save
    validation.write_model = faulty_best
    validation.evaluation_batches = faulty_batches  # type: ignore[assignment]
    epoch_check.EpochCheck.check_epoch = faulty_check  # type: ignore[method-assign]
    step.TrainStep.accumulate = faulty_accumulate  # type: ignore[method-assign]
    if "OUTAGE_S" in os.environ:
        from vlal_dist.storage import s3_client

        s3_client.OUTAGE_S = float(os.environ["OUTAGE_S"])


def set_clock() -> None:
    """Start this program again under libfaketime."""
    for fault in FAULTS:
        if (fault["kind"], fault.get("rank")) == ("clock", RANK) and "FAKETIME" not in os.environ:
            more = {"FAKETIME": fault["offset"], "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
            more["LD_PRELOAD"] = fault["library"]
            os.execve(sys.executable, sys.orig_argv, {**os.environ, **more})


def main() -> int:
    set_clock()
    note("begin", pid=os.getpid(), parent=os.getppid())
    look = stop.launcher_processes

    def look_and_install() -> list[Process | None]:
        launcher = look()  # as early as in the real program
        install()
        return launcher

    stop.launcher_processes = look_and_install
    code = vlal_dist.train.main()
    note("end", code=code)
    return code


if __name__ == "__main__":
    sys.exit(main())
