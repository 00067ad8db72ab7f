"""Two of README's promises on a longer run than tests have time for. Exit code 1 if one is broken.

    python benchmarks/torture.py kill    # train.py killed at random moments and started again until it ends
    python benchmarks/torture.py fuzz    # damaged scans, checkpoints and data lists through their readers

kill: the end must be that of the run left alone, every tensor of last.pt and best.pt.
Half of the --kills come as a file is saved. Each start has its own number of workers, and the cache or none.
fuzz: each of --inputs loads or is refused in one line, within 5 s of a core, and no payload runs.
"""

import argparse
import gzip
import io
import json
import os
import pickle
import random
import shutil
import signal
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

# five cases to train on, one to validate
SMALL = ["--folds", "6", "--epochs", "4", "--lr", "1e-3", "--crop", "16", "16", "16", "--filters", "8",
         "--pool", "4", "--dim", "4", "--validate-every", "2", "--amp", "off"]


def start(out, rng):
    """Starts train.py, which prints into OUT.txt -> its process, as soon as that trains or has ended."""
    command = [sys.executable, ROOT / "train.py", *SMALL, "--out", out, "--data", out.with_name("cohort"),
               "--workers", str(rng.randrange(1, 4)), "--cache", rng.choice(("none", f"{out}-cache"))]
    with open(f"{out}.txt", "w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while " epochs of " not in Path(log.name).read_text() and run.poll() is None:
        time.sleep(0.01)
    return run


def kill_while_running(out, run, seconds, saving):
    """Kills it and its readers after `seconds`, or as it saves its next file -> whether it still ran."""
    time.sleep(seconds)
    while saving and run.poll() is None and not any(out.glob(".part*")):
        time.sleep(0.0005)
    if run.poll() is not None:
        return False
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return True


def same(found, expected):
    """Whether two checkpoints are equal but for the seconds in the log."""
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(
            same(found[k], v) for k, v in expected.items() if k != "seconds")
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def ends_unlike(out, run, alone):
    """Whether a run does not end like the one left alone, or leaves more than its three files."""
    assert run.wait() == 0, Path(f"{out}.txt").read_text()
    files = sorted(path.name for path in out.iterdir())
    equal = [same(*(torch.load(folder / name, weights_only=True) for folder in (out, alone)))
             for name in ("last.pt", "best.pt")]
    if all(equal) and files == ["best.pt", "last.pt", "log.csv"]:
        return False
    print(f"{out} ends unlike {alone}: {equal}, {files}\n{Path(f'{out}.txt').read_text()}")
    return True


def kill(args):
    """Kills runs, each until it ends -> how many ended unlike the one left alone."""
    rng, done, runs, unlike = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(6):
            case = phantom.make_case((32, 32, 32), 0, number)
            phantom.save_case(Path(scratch, "cohort"), "brats2021", number, *case)
        alone = Path(scratch, "alone")
        run, begin = start(alone, rng), time.monotonic()
        assert run.wait() == 0, Path(f"{alone}.txt").read_text()
        seconds = time.monotonic() - begin    # of training
        while done < args.kills:
            out = Path(scratch, f"run{runs}")
            run = start(out, rng)
            while done < args.kills and kill_while_running(out, run, rng.uniform(0, seconds), done % 2):
                done += 1
                run = start(out, rng)
            runs += 1
            unlike += ends_unlike(out, run, alone)
    print(f"{done} kills, {runs} runs ended, {unlike} unlike the run left alone")
    return unlike


# ---- fuzz -------------------------------------------------------------------------------------------------

NUMBERS = 0, 1, -1, 2, 7, 348, 2**15 - 1, -(2**15), 2**31 - 1, -(2**31), 1e-38, 1e38, np.nan, np.inf
THINGS = 10**9, -1, 0, "8", np.nan, None, [], [10**9] * 3, {"a": 1}, "x" * 10**5, 10**400, np.inf


class Payload:
    """Pickled, it makes the file `path` where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def make_parts():
    views = train.TwoViews(train.SegResNet(filters=8), train.Projector(8, 4, 8))
    return {"views": views, "optimizer": torch.optim.AdamW(views.parameters())}


def make_material(folder):
    """What is damaged: a case's volumes, a 4-D one, a map, checkpoints, a data list -> {name: bytes}"""
    images, labels = phantom.make_case((32, 32, 32), 0, 0)
    volumes = {"case0_seg": labels, "4d": images.transpose(1, 2, 3, 0),
               "map": np.full((32, 32, 32, 3), 0.7, np.float32)}
    volumes |= {f"case0_{name}": image for name, image in zip(data.MODALITIES, images)}
    for name, volume in volumes.items():
        phantom.save(folder / f"{name}.nii", volume)
    parts = make_parts()
    checkpoint = {"model": parts["views"].network.state_dict(), "epoch": 1, "best": 0.0, "log": [],
                  "settings": {"filters": 8, "norm": "instance"}, "train_cases": [], "val_cases": []}
    checkpoint |= {name: part.state_dict() for name, part in parts.items()}
    for name in ("best.pt", "last.pt"):
        data.save_tensors(folder / name, checkpoint)
    entries = [{"fold": fold, "label": f"case{fold}/case{fold}_seg.nii.gz"} for fold in range(5)]
    (folder / "list.json").write_text(json.dumps({"training": entries}))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def damage(rng, content):
    """The rest cut off, or something put behind, or up to eight bytes changed, often in the first 352."""
    content, way = bytearray(content), rng.random()
    if way < 0.2:
        return bytes(content[: rng.randrange(len(content))])
    if way < 0.3:
        return bytes(content + rng.randbytes(5000))
    stop = rng.choice((min(352, len(content)), len(content)))
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(stop)] = rng.choice((0, 255, rng.randrange(256)))
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
        content = damage(rng, content)
    elif way < 0.85:    # much from little: zeros behind a header that asks for them
        header.set_data_shape((rng.choice((320, 1000, 30000)),) * 3)
        return gzip.compress(header.structarr.tobytes(), 1) + gzip.compress(bytes(2**25)) * 8, ".nii.gz"
    packed = gzip.compress(content, 1, mtime=0)
    return rng.choice(((content, ".nii"), (packed, ".nii.gz"), (damage(rng, packed), ".nii.gz"),
                       (content, ".nii.gz")))


def damage_checkpoint(rng, content, hostile):
    """A damaged, foreign or hostile checkpoint -> its bytes."""
    way = rng.random()
    if way < 0.6:
        return damage(rng, content) if way < 0.5 else pickle.dumps(hostile)
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    weights = loaded["model"]["init_conv.weight"]
    others = weights.half(), weights[:1], weights * np.nan, torch.zeros(1).expand(2**20, 2**12), 3, None
    if way < 0.7:
        where, things = loaded["model"], others
    else:
        where, things = rng.choice((loaded, loaded["settings"], loaded["optimizer"])), (*THINGS, hostile)
    where[rng.choice(list(where))] = rng.choice(things)
    torch.save(loaded, packed := io.BytesIO())
    return packed.getvalue()


def damage_list(rng, content):
    """A data list that is damaged, or has other things in it -> its bytes."""
    loaded = json.loads(content)
    where = rng.choice((loaded, loaded["training"], loaded["training"][0]))
    where[rng.choice(list(where) if isinstance(where, dict) else range(5))] = rng.choice(THINGS)
    return rng.choice((*[damage(rng, content), json.dumps(loaded).encode()] * 5, b"[" * 10**5))


def read_one(rng, material, folder):
    """One damaged input through the reader that users reach it by. Raises whatever that raises."""
    for name, content in material.items():
        if name.startswith("case0"):
            (folder / name).write_bytes(content)
    kind = rng.choice(list(material))
    path, content = folder / kind, material[kind]
    if path.suffix == ".pt":
        path.write_bytes(damage_checkpoint(rng, content, Payload(folder / "payload ran")))
        if kind == "best.pt":
            return infer.load_checkpoint(path)
        return train.resume(path, {"filters": 8}, make_parts())
    if kind == "list.json":
        path.write_bytes(damage_list(rng, content))
        return train.listed_folds(path, data.find_cases(folder))
    path.unlink(missing_ok=True)
    content, suffix = damage_volume(rng, content)
    path = path.with_suffix(suffix)
    path.write_bytes(content)
    if kind == "map.nii":
        try:
            return ensemble.load_maps([path])
        except ValueError as error:
            raise data.InputError(error) from None
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
    except data.InputError as error:
        line = " ".join(str(error).split())    # as commands print it
        verdict = "refused in one line" if line.isprintable() and len(line) < 1000 else f"says {line!r}"
    except BaseException:
        verdict = traceback.format_exc()
    signal.setitimer(signal.ITIMER_PROF, 0)
    return f"a payload ran; {verdict}" if (folder / "payload ran").exists() else verdict


def fuzz(args):
    """-> the number of violations"""
    outcomes = Counter()
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
            verdict = judge(random.Random(f"{args.seed} {number}"), material, folder)
            if verdict not in ("loaded", "refused in one line"):
                print(f"input {number}: {verdict}", flush=True)
                verdict = "neither"
            outcomes[verdict] += 1
    print(f"{args.inputs} inputs, seed {args.seed}: {dict(outcomes)}")
    return outcomes["neither"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("kill", "fuzz"))
    for flag, default in (("--kills", 40), ("--inputs", 2000), ("--seed", 0)):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"(default: {default})")
    args = parser.parse_args()
    sys.exit(bool(kill(args) if args.what == "kill" else fuzz(args)))


if __name__ == "__main__":
    main()
