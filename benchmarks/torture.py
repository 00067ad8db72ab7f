"""Two of README's promises on a longer run than tests have time for. Exit code 1 if one is broken.

    python benchmarks/torture.py kill    # train.py killed at random moments and started again until it ends
    python benchmarks/torture.py fuzz    # damaged scans, checkpoints and data lists through their readers

kill: the end must be that of the run left alone, every tensor of last.pt and best.pt.
--one and --two count kills of the whole run, on one process and on two, half of them as a file is saved.
--agent and --agents count kills of a rank of two, which torchrun starts again, with one agent and with two.
Each start has its own number of workers, and the cache or none.
fuzz: each of --inputs loads or is refused in one line, within 5 s of a core, and no payload runs.
"""

import argparse
import gzip
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import data  # noqa: E402
import ensemble  # noqa: E402
import infer  # noqa: E402
import phantom  # noqa: E402
import train  # noqa: E402

# ---- kill -------------------------------------------------------------------------------------------------

# five cases to train on, one to validate: 5 steps an epoch on one process, 3 on two
SMALL = ["--folds", "6", "--epochs", "4", "--lr", "1e-3", "--crop", "16", "16", "16", "--filters", "8",
         "--pool", "4", "--dim", "4", "--validate-every", "2", "--amp", "off"]


def launch(out, rng, ranks, agents=1):
    """Starts train.py, which prints into OUT.txt -> its root processes, one an agent of torchrun's."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks // agents}", "--max-restarts=1"]
    if agents > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            endpoint = f"--rdzv-endpoint=127.0.0.1:{probe.getsockname()[1]}"
        torchrun += [f"--nnodes={agents}", "--rdzv-backend=c10d", endpoint, "--local-addr=127.0.0.1"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), ROOT / "train.py", *SMALL, "--out", out,
               "--data", out.with_name("cohort"), "--workers", str(rng.randrange(3)),
               "--cache", rng.choice(("none", f"{out}-cache"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(f"{out}.txt", "a") as log:
        return [subprocess.Popen(command, stdout=log, stderr=log, env=environment) for _ in range(agents)]


def printed(out):
    return Path(f"{out}.txt").read_text()


def wait_for_training(out, start, roots):
    """Until the run's start number `start` has got as far as training, or a process has ended."""
    while printed(out).count(" epochs of ") < start and all(root.poll() is None for root in roots):
        time.sleep(0.01)


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:    # it has just ended
        return []


def kill_all(root):
    """SIGKILL for a process and all below it at once, as when a machine goes down."""
    pids = [root.pid]
    for pid in pids:
        pids += children(pid)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    root.wait()


def same(found, expected):
    """Whether two checkpoints are equal but for the two columns of time in the log."""
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(
            same(found[k], v) for k, v in expected.items() if k not in ("seconds", "cases_per_second"))
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def ends_unlike(out, alone):
    """1 if a run did not end like the one left alone, or left more than its three files; prints why."""
    files = sorted(path.name for path in out.iterdir())
    equal = [same(*(torch.load(folder / name, weights_only=True) for folder in (out, alone)))
             for name in ("last.pt", "best.pt")]
    if all(equal) and files == ["best.pt", "last.pt", "log.csv"]:
        return 0
    print(f"{out.name} ends unlike the run left alone: {equal}, {files}\n{printed(out)}")
    return 1


def kill_runs(alone, seconds, kills, rng, ranks):
    """Kills whole runs and starts each again until it ends -> a line of figures, how many ended unlike."""
    done, runs, unlike = 0, 0, 0
    while done < kills:
        out, starts, code = alone.with_name(f"run{ranks}-{runs}"), 0, None
        while code is None:
            (root,), starts = launch(out, rng, ranks), starts + 1
            wait_for_training(out, starts, [root])
            try:
                code = root.wait(rng.uniform(0, seconds) if done < kills else None)
            except subprocess.TimeoutExpired:
                while done % 2 and root.poll() is None and not any(out.glob(".part*")):
                    time.sleep(0.0005)
                code = root.poll()
                done += code is None
                kill_all(root)
        assert code == 0, printed(out)
        runs, unlike = runs + 1, unlike + ends_unlike(out, alone)
    return f"{done} kills, {runs} runs ended", unlike


def kill_ranks(alone, seconds, kills, rng, agents):
    """Kills a rank of two in each run, which torchrun starts again -> as `kill_runs`."""
    unlike = 0
    for number in range(kills):
        out = alone.with_name(f"agents{agents}-{number}")
        roots = launch(out, rng, 2, agents)
        wait_for_training(out, 1, roots)
        time.sleep(rng.uniform(0, 0.7 * seconds))    # before it is leaving already
        os.kill(rng.choice([child for root in roots for child in children(root.pid)]), signal.SIGKILL)
        codes = [root.wait() for root in roots]
        assert codes == [0] * agents and printed(out).count(" epochs of ") == 2, f"{codes}\n{printed(out)}"
        unlike += ends_unlike(out, alone)
    return f"{kills} ranks killed and started again, {kills} runs ended", unlike


def kill(args):
    """-> how many runs ended unlike the one left alone"""
    rng, total = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        make = [sys.executable, ROOT / "examples" / "phantom.py", f"{scratch}/cohort", "--cases", "6"]
        subprocess.run([*make, "--shape", "32", "32", "32"], check=True, stdout=subprocess.DEVNULL)
        for what, ranks, count, way, argument in (
                ("one process", 1, args.one, kill_runs, 1), ("two processes", 2, args.two, kill_runs, 2),
                ("one agent", 2, args.agent, kill_ranks, 1), ("two agents", 2, args.agents, kill_ranks, 2)):
            alone = Path(scratch, f"alone{ranks}")
            if count and not alone.exists():
                roots = launch(alone, rng, ranks)
                wait_for_training(alone, 1, roots)
                start = time.monotonic()
                assert roots[0].wait() == 0, printed(alone)
                seconds = time.monotonic() - start
            if count:
                figures, unlike = way(alone, seconds, count, rng, argument)
                total += unlike
                print(f"{what}: {figures}, {unlike} unlike the run left alone ({seconds:.1f} s)", flush=True)
    return total


# ---- fuzz -------------------------------------------------------------------------------------------------

NUMBERS = 0, 1, -1, 2, 7, 348, 2**15 - 1, -(2**15), 2**31 - 1, -(2**31), 1e-38, 1e38, np.nan, np.inf
THINGS = 10**9, -1, 0, "8", np.nan, None, [], [10**9] * 3, {"a": 1}, "x" * 10**5, 10**400, np.inf


class Payload:
    """Pickled, it makes the file `path` where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def make_material(folder):
    """What is damaged: a scan, labels, a 4-D file, a map, a checkpoint, a data list -> {name: bytes}"""
    images, labels = phantom.make_case((32, 32, 32), 0, 0)
    maps = np.full((32, 32, 32, 3), 0.7, np.float32)
    volumes = {"scan": images[0], "labels": labels, "4d": images.transpose(1, 2, 3, 0), "map": maps}
    for name, volume in volumes.items():
        phantom.save(folder / f"{name}.nii", volume)
    views = train.TwoViews(train.SegResNet(filters=8), train.Projector(8, 4, 8))
    data.save_tensors(folder / "last.pt", {
        "model": views.network.state_dict(), "settings": {"filters": 8, "norm": "instance"},
        "train_cases": [], "val_cases": [], "views": views.state_dict(), "epoch": 1, "best": 0.0, "log": [],
        "optimizer": torch.optim.AdamW(views.parameters()).state_dict()})
    entries = [{"fold": fold, "label": f"case{fold}/case{fold}_seg.nii.gz"} for fold in range(5)]
    (folder / "list.json").write_text(json.dumps({"training": entries}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(rng, content, stop=None):
    """Up to eight bytes changed before `stop`, or the rest cut off, or something put behind."""
    content, way = bytearray(content), rng.random()
    stop = min(stop or len(content), len(content))
    if way < 0.7:
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(stop)] = rng.choice((0, 255, rng.randrange(256)))
    elif way < 0.9:
        del content[rng.randrange(len(content)):]
    else:
        content += rng.randbytes(5000)
    return bytes(content)


def damage_volume(rng, content):
    """A damaged volume -> its bytes, and .nii or .nii.gz."""
    header, way = nib.Nifti1Header(content[:348], check=False), rng.random()
    if way < 0.5:
        field = header.structarr[rng.choice(header.template_dtype.names)]
        with np.errstate(all="ignore"):
            number = np.array(rng.choice(NUMBERS)).astype("f8" if field.dtype.kind == "S" else field.dtype)
        field[rng.randrange(field.size) if field.ndim else ()] = number
        content = header.structarr.tobytes() + content[348:]
    elif way < 0.8:
        content = damage(rng, content, stop=rng.choice((352, None)))
    elif way < 0.85:    # much from little: zeros behind a header that asks for them
        header.set_data_shape((rng.choice((320, 1000, 30000)),) * 3)
        return gzip.compress(header.structarr.tobytes(), 1) + gzip.compress(bytes(2**25)) * 8, ".nii.gz"
    packed = gzip.compress(content, 1, mtime=0)
    return rng.choice(((content, ".nii"), (packed, ".nii.gz"), (damage(rng, packed), ".nii.gz"),
                       (content, ".nii.gz")))


def damage_checkpoint(rng, content, folder):
    """A damaged, foreign or hostile checkpoint -> its bytes."""
    way, hostile = rng.random(), Payload(folder / "payload ran")
    if way < 0.6:
        return damage(rng, content) if way < 0.5 else pickle.dumps(hostile)
    (folder / "whole.pt").write_bytes(content)
    loaded = torch.load(folder / "whole.pt", weights_only=True)
    weights = loaded["model"]["init_conv.weight"]
    if way < 0.7:
        others = weights.half(), weights[:1], weights * np.nan, torch.zeros(1).expand(2**20, 2**12), 3, None
        loaded["model"][rng.choice(list(loaded["model"]))] = rng.choice(others)
    else:
        where = rng.choice((loaded, loaded["settings"], loaded["optimizer"]))
        where[rng.choice(list(where))] = rng.choice((*THINGS, hostile))
    torch.save(loaded, folder / "whole.pt")
    return (folder / "whole.pt").read_bytes()


def damage_list(rng, content):
    """A data list that is damaged, or has other things in it -> its bytes."""
    loaded = json.loads(content)
    where = rng.choice((loaded, loaded["training"], loaded["training"][0]))
    where[rng.choice(list(where) if isinstance(where, dict) else range(5))] = rng.choice(THINGS)
    return rng.choice((*[damage(rng, content), json.dumps(loaded).encode()] * 5, b"[" * 10**5))


def read_one(rng, material, folder):
    """One damaged input through the reader that users reach it by. Raises whatever that raises."""
    kind = rng.choice(("scan.nii", "labels.nii", "4d.nii", "map.nii", "best.pt", "last.pt", "list.json"))
    path = folder / kind
    if kind.endswith(".pt"):
        path.write_bytes(damage_checkpoint(rng, material["last.pt"], folder))
        if kind == "best.pt":
            return infer.load_checkpoint(path)
        views = train.TwoViews(train.SegResNet(filters=8), train.Projector(8, 4, 8))
        parts = {"views": views, "optimizer": torch.optim.AdamW(views.parameters())}
        return train.resume(path, {"filters": 8}, parts)
    for name in ("t1", "t1ce", "t2", "flair", "seg"):
        (folder / f"case0_{name}.nii").write_bytes(material["labels.nii" if name == "seg" else "scan.nii"])
    if kind == "list.json":
        path.write_bytes(damage_list(rng, material[kind]))
        return train.listed_folds(path, data.find_cases(folder))
    content, suffix = damage_volume(rng, material[kind])
    if kind in ("scan.nii", "labels.nii"):
        path = folder / f"case0_{rng.choice(data.MODALITIES) if kind == 'scan.nii' else 'seg'}.nii"
        path.unlink()
    path = path.with_suffix(suffix)
    path.write_bytes(content)
    if kind == "map.nii":
        return ensemble.load_maps([path])
    if kind == "4d.nii":
        return data.read_volume(path, 2)
    image, _, affine = data.load_case(*data.find_cases(folder))
    return data.normalize(image), data.doubts(image, affine)


def judge(rng, material, folder):
    """-> "loaded", "refused in one line", or what is wrong"""
    signal.setitimer(signal.ITIMER_PROF, 5)    # a traceback of where it is then
    try:
        read_one(rng, material, folder)
        verdict = "loaded"
    except (data.InputError, ensemble.InputError) as error:
        line = " ".join(str(error).split())    # as commands print it
        verdict = "refused in one line" if line.isprintable() and len(line) < 1000 else f"says {line!r}"
    except BaseException:
        verdict = traceback.format_exc()
    signal.setitimer(signal.ITIMER_PROF, 0)
    return f"a payload ran; {verdict}" if (folder / "payload ran").exists() else verdict


def fuzz(args):
    """-> the number of violations"""
    outcomes, slowest = Counter(), 0.0
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    warnings.simplefilter("ignore")    # PyTorch's, about foreign pickles
    signal.signal(signal.SIGPROF, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "input")
        folder.mkdir()
        material = make_material(folder)
        for number in range(args.inputs):
            shutil.rmtree(folder)
            folder.mkdir()
            start = time.process_time()
            verdict = judge(random.Random(f"{args.seed} {number}"), material, folder)
            slowest = max(slowest, time.process_time() - start)
            if verdict not in ("loaded", "refused in one line"):
                print(f"input {number}: {verdict}", flush=True)
                verdict = "neither"
            outcomes[verdict] += 1
    print(f"{args.inputs} inputs, seed {args.seed}: {dict(outcomes)}; the slowest took {slowest:.2f} s")
    return outcomes["neither"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("kill", "fuzz"))
    counts = {"--one": 20, "--two": 20, "--agent": 5, "--agents": 5, "--inputs": 2000, "--seed": 0}
    for flag, default in counts.items():
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"(default: {default})")
    args = parser.parse_args()
    sys.exit(bool(kill(args) if args.what == "kill" else fuzz(args)))


if __name__ == "__main__":
    main()
