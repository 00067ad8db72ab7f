"""What the README promises about trust, on a longer run than the tests have time for. Each ends with figures, and with code 1 if one is bad.

    python benchmarks/torture.py fuzz [--cases 10000]    # damaged scans, checkpoints and names through the real readers
    python benchmarks/torture.py kill [--kills 100]      # train.py killed at random moments, on one process and on two
    python benchmarks/torture.py soak [--steps 2000]     # memory and open files of a long run
"""

import argparse
import gzip
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import data  # noqa: E402
import ensemble  # noqa: E402
import figure  # noqa: E402
import infer  # noqa: E402
import phantom  # noqa: E402
import train  # noqa: E402

# ---- fuzz -------------------------------------------------------------------------------------------------------------

MOST_SECONDS, MOST_BYTES = 5, 2 * 2**30
EXTREMES = (0, 1, -1, 2, 7, 348, 2**15 - 1, -(2**15), 2**31 - 1, -(2**31), 1e-38, 1e38, float("nan"), float("inf"), -float("inf"))


class Payload:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def make_material(folder):
    """What is mutated: a case, a probability map, a best.pt and a last.pt, as bytes by name."""
    images, labels = phantom.make_case((32, 32, 32), 0, 0)
    for name, volume in {"image": images[0], "label": labels, "map": np.random.default_rng(0).random((32, 32, 32, 3), dtype=np.float32)}.items():
        phantom.save(folder / f"{name}.nii", volume)
    torch.manual_seed(0)
    views = train.TwoViews(train.SegResNet(filters=8), train.Projector(8, 4, 8))
    optimizer = torch.optim.AdamW(views.parameters())
    settings = {"filters": 8, "norm": "instance", "crop": [32, 32, 32], "fold": "0", "amp": "off"}
    checkpoint = {"model": views.network.state_dict(), "settings": settings, "train_cases": ["a"], "val_cases": ["b"], "et_label": 4, "epoch": 1,
                  "dice": []}
    train.save_checkpoint(folder / "best.pt", checkpoint)
    train.save_checkpoint(folder / "last.pt", {**checkpoint, "views": views.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {},
                                               "step": 0, "best": 0.0, "log": [], "sums": [0.0] * 5, "seconds": 0.0})
    (folder / "log.csv").write_text("epoch,dice_loss,barlow,dice_et,dice_tc,dice_wt\n1,0.9,30,,,\n2,0.8,20,0.1,0.2,0.3\n")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mutate_bytes(rng, content, start=0, stop=None):
    """One to eight bytes changed between start and stop, or the rest cut off, or something put behind."""
    content = bytearray(content)
    stop = min(stop or len(content), len(content))
    way = rng.random()
    if way < 0.7 and stop > start:
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(start, stop)] = rng.choice((0, 255, 128, rng.randrange(256)))
    elif way < 0.9:
        del content[rng.randrange(len(content)):]
    else:
        content += rng.randbytes(rng.randint(1, 5000)) if rng.random() < 0.5 else bytes(content)
    return bytes(content)


def mutate_header(rng, content):
    """One field of a NIfTI-1 header, or one element of it, to an extreme value."""
    header = nib.Nifti1Header(content[:348], check=False)
    field = rng.choice(header.template_dtype.names)
    array = header.structarr[field]
    if array.dtype.kind == "S":
        header.structarr[field] = rng.randbytes(array.dtype.itemsize)
    else:
        with np.errstate(all="ignore"):
            value = np.array(rng.choice(EXTREMES)).astype(array.dtype)
        if array.ndim:
            array[rng.randrange(len(array)) if rng.random() < 0.7 else slice(None)] = value
        else:
            header.structarr[field] = value
    block = header.structarr.tobytes()
    return block + content[348:]


def extend(rng, content):
    """Header extensions that claim to be as long as they like, before a voxel block that is much longer than the header says."""
    claims = struct.pack("<4b2i", 1, 0, 0, 0, rng.choice((-1, 0, 7, 8, 16, 2**31 - 16, rng.randrange(2**31))), 6) + bytes(24)
    return content[:108] + struct.pack("<f", 384) + content[112:348] + claims + bytes(2**20)


def mutate_volume(rng, content):
    """A damaged .nii or .nii.gz -> (its bytes, its suffix)."""
    way = rng.random()
    if way < 0.45:
        content = mutate_header(rng, content)
    elif way < 0.6:
        content = mutate_bytes(rng, content, 0, 352)
    elif way < 0.7:
        content = mutate_bytes(rng, content, 352)
    elif way < 0.72:
        content = extend(rng, content)
    if rng.random() < 0.4 and way < 0.72:
        return content, rng.choice((".nii", ".nii", ".nii.gz"))    # now and then plain under a packed name
    packed = gzip.compress(content, 1)
    if way >= 0.95:    # much from little: zeros behind a header that asks for all of them
        header = nib.Nifti1Header(content[:348], check=False)
        header.set_data_shape((rng.choice((320, 1000, 30000)),) * 3)
        packed = gzip.compress(header.structarr.tobytes() + bytes(4), 1) + gzip.compress(bytes(2**25), 9) * 8
    elif way >= 0.72:
        packed = mutate_bytes(rng, packed)
    return packed, ".nii.gz" if rng.random() < 0.95 else ".nii"


def mutate_checkpoint(rng, content, folder, marker):
    """A damaged, foreign or hostile checkpoint -> its bytes."""
    way, path = rng.random(), folder / "mutated.pt"
    if way < 0.4:
        return mutate_bytes(rng, content)
    if way < 0.55:    # the entries that hold no weights, where every byte says something
        with zipfile.ZipFile(folder / "whole.pt") as old, zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as new:
            for entry in old.infolist():
                held = old.read(entry)
                if rng.random() < 0.02:
                    held = bytes(2**25)
                new.writestr(entry.filename, mutate_bytes(rng, held) if entry.file_size < 60000 and rng.random() < 0.5 else held)
        return path.read_bytes()
    if way < 0.65:
        return pickle.dumps(Payload(marker))
    loaded = torch.load(folder / "whole.pt", weights_only=True)
    if way < 0.75:
        loaded[rng.choice(("model", "settings", "extra"))] = Payload(marker)
    elif way < 0.9:
        nonsense = (10**9, -1, 0, "8", float("nan"), None, [], [10**9] * 3, [8, 8, 8], {"a": 1}, torch.zeros(1).expand(10**9), "x" * 10**5)
        where = loaded if rng.random() < 0.4 else loaded["settings"]
        where[rng.choice(list(where))] = rng.choice(nonsense)
    else:
        weights = loaded["model"]
        name = rng.choice(list(weights))
        weights[name] = rng.choice((weights[name].half(), weights[name].int(), weights[name][:1], torch.zeros(1).expand(2**20, 2**12), 3))
    torch.save(loaded, path)
    return path.read_bytes()


NAMES = ("..", "...", "-rf", "a b", "a\nb", "a\x1b[31m", "\udcff", "é" * 60, "x" * 200, "%s%n", "$(touch x)", "con", "BraTS-GLI-00000-000", "~", "'", "*")


def one_case(rng, material, folder, marker):
    """One damaged input through the reader that users reach it by. Raises whatever that raises."""
    kind = rng.choice(("image", "image", "label", "map", "best.pt", "last.pt", "log.csv", "names"))
    if kind in ("image", "label"):
        content, suffix = mutate_volume(rng, material[f"{kind}.nii"])
        paths = [folder / f"BraTS2021_1_{modality}.nii" for modality in (*phantom.MODALITIES, "seg")]
        for path in paths:
            path.write_bytes(material["label.nii" if path.name.endswith("seg.nii") else "image.nii"])
        bad = paths[-1] if kind == "label" else paths[rng.randrange(4)]
        bad.unlink()
        bad.with_name(bad.stem + suffix).write_bytes(content)
        (case,) = data.find_cases(folder)
        image, _, _ = data.load_case(case)
        data.normalize(image)
    elif kind == "map":
        content, suffix = mutate_volume(rng, material["map.nii"])
        (folder / f"mutated{suffix}").write_bytes(content)
        ensemble.load_maps([folder / f"mutated{suffix}"])
    elif kind == "log.csv":
        (folder / kind).write_bytes(mutate_bytes(rng, material[kind]))
        figure.read_logs([folder])
    elif kind == "names":
        name, other = rng.choice(NAMES), rng.choice(NAMES)
        inside = folder / "cohort" / other if other.strip(".") else folder / "cohort"
        inside.mkdir(parents=True)
        for modality in rng.sample(("t1", "t1ce", "t2", "flair", "seg", "t1n", "t2w"), 4):
            (inside / f"{name}{rng.choice('_-')}{modality}.nii{rng.choice(('', '.gz'))}").touch()
        cases = data.find_cases(folder / "cohort")
        data.describe(cases), data.split_folds(cases, 1)
        for case in cases:    # where a prediction would go
            assert (folder / "out" / f"{case.name}.nii.gz").resolve().parent == (folder / "out").resolve(), case.name
            str(case).encode()
    else:
        (folder / "whole.pt").write_bytes(material[kind])
        path = folder / kind
        path.write_bytes(mutate_checkpoint(rng, material[kind], folder, marker))
        if kind == "best.pt":
            infer.load_checkpoint(path)
        else:
            views = train.TwoViews(train.SegResNet(filters=8), train.Projector(8, 4, 8))
            train.load_last(path, {"filters": 8}, views, torch.optim.AdamW(views.parameters()), torch.amp.GradScaler("cpu", enabled=False))


def too_slow(*_):
    raise TimeoutError(f"more than {MOST_SECONDS} s")


def fuzz(cases, seed):
    """Every input either loads or is refused in one line. Run it in a process of its own: it limits its memory. -> the number of violations"""
    outcomes, slowest = Counter(), 0.0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as noise:
        scratch, marker = Path(scratch), Path(scratch) / "payload_ran"
        (scratch / "material").mkdir()
        material = make_material(scratch / "material")
        own_stderr = os.dup(2)
        os.dup2(noise.fileno(), 2)
        used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, used + MOST_BYTES))
        signal.signal(signal.SIGALRM, too_slow)
        for number in range(cases):
            folder = scratch / "case"
            folder.mkdir()
            start, verdict = time.monotonic(), "loaded"
            signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
            try:
                one_case(random.Random(f"{seed} {number}"), material, folder, marker)
            except (data.InputError, ensemble.InputError) as error:
                verdict = "refused" if str(error).isprintable() and len(str(error)) < 2000 else f"a message of more than a line: {error!r}"
            except BaseException:
                verdict = traceback.format_exc()
            signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.monotonic() - start)
            noise.seek(0)
            printed = noise.read()
            if printed or marker.exists():
                verdict = f"a payload ran: {verdict}" if marker.exists() else f"printed {printed!r}"
                noise.truncate(0)
                marker.unlink(missing_ok=True)
            outcomes[verdict if verdict in ("loaded", "refused") else "violation"] += 1
            if verdict not in ("loaded", "refused"):
                print(f"case {number}: {verdict}", flush=True)
            shutil.rmtree(folder)
        os.dup2(own_stderr, 2)
    print(f"fuzz: {cases} inputs, seed {seed}: {outcomes['loaded']} loaded, {outcomes['refused']} refused in one line, "
          f"{outcomes['violation']} violations; the slowest took {slowest:.2f} s")
    return outcomes["violation"]


# ---- kill -------------------------------------------------------------------------------------------------------------

# saved after every step, so that a kill may fall into a save, into a step, and between any two
SAVING = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train; train.SAVE_EVERY = 0; train.main()"
SMALL = ["--folds", "6", "--fold", "0", "--epochs", "3", "--lr", "1e-3", "--crop", "16", "16", "16", "--filters", "8", "--pool", "4", "--dim", "4",
         "--validate-every", "2", "--workers", "1", "--amp", "off"]


def start_training(cohort, out, processes):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--no-python", sys.executable] if processes > 1 else []
    with open(out.with_suffix(".txt"), "a") as log:
        return subprocess.Popen([sys.executable, *launcher, "-c", SAVING, "--data", str(cohort), "--out", str(out), *SMALL], start_new_session=True,
                                stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def descendants(pid):
    """A process and all below it, those in sessions of their own too."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [below for child in task.read_text().split() for below in descendants(int(child))]
        except OSError:
            pass    # it has just ended
    return found


def end(process, number):
    """SIGKILL for the whole tree at once, as when a machine goes down; SIGTERM for its root alone."""
    for pid in descendants(process.pid) if number == signal.SIGKILL else [process.pid]:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
    return process.wait(timeout=60)


def same(found, expected):
    """Whether two checkpoints are equal but for the two columns of time in the log."""
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[k], v) for k, v in expected.items() if k not in ("seconds", "cases_per_second"))
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def kill(kills, seed, processes=(1, 2)):
    """Runs killed at random moments, every fourth time by SIGTERM, and started again until they end. -> the number of unequal ends"""
    rng, unequal = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        subprocess.run([sys.executable, ROOT / "examples" / "phantom.py", scratch / "cohort", "--cases", "6", "--shape", "32", "32", "32"], check=True,
                       stdout=subprocess.DEVNULL)
        for world in processes:
            start, whole = time.monotonic(), scratch / f"whole{world}"
            assert start_training(scratch / "cohort", whole, world).wait() == 0, whole.with_suffix(".txt").read_text()
            seconds, done, ends, in_time, saved_by_signal = time.monotonic() - start, 0, 0, 0, 0
            expected = [torch.load(whole / name, weights_only=True) for name in ("last.pt", "best.pt")]
            while done < kills:
                out = scratch / f"killed{world}-{ends}"
                while True:
                    process, number = start_training(scratch / "cohort", out, world), signal.SIGTERM if done % 4 == 3 else signal.SIGKILL
                    try:
                        code = process.wait(rng.uniform(0, seconds) if done < kills else 300)
                        assert code == 0, out.with_suffix(".txt").read_text()
                        in_time += 1
                        break
                    except subprocess.TimeoutExpired:
                        end(process, number)
                        done += 1
                        saved_by_signal += number == signal.SIGTERM
                ends += 1
                found = [torch.load(out / name, weights_only=True) for name in ("last.pt", "best.pt")]
                files = sorted(path.name for path in out.iterdir())
                if not same(found, expected) or files != ["best.pt", "last.pt", "log.csv"]:
                    unequal += 1
                    print(f"{out.name}: does not end like the run left alone, with {files}\n{out.with_suffix('.txt').read_text()}")
            print(f"kill: {world} process{'es' * (world > 1)}, a run of {seconds:.1f} s: {done} kills ({saved_by_signal} by SIGTERM), {ends} runs ended, "
                  f"{unequal} unlike the run left alone", flush=True)
    return unequal


# ---- soak -------------------------------------------------------------------------------------------------------------


def weigh(pid):
    """Resident memory of a process and all below it, in MB, and their open files."""
    memory = files = 0
    for below in descendants(pid):
        try:
            memory += int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{below}/status").read_text())[1]) / 1024
            files += len(os.listdir(f"/proc/{below}/fd"))
        except (OSError, TypeError):
            pass
    return memory, files


def soak(steps):
    """One long run, watched from outside at the end of every epoch of ten steps. -> 1 if memory or open files grew"""
    with tempfile.TemporaryDirectory() as scratch:
        cohort, out = Path(scratch) / "cohort", Path(scratch) / "out"
        subprocess.run([sys.executable, ROOT / "examples" / "phantom.py", cohort, "--cases", "10", "--shape", "32", "32", "32"], check=True,
                       stdout=subprocess.DEVNULL)
        process = subprocess.Popen([sys.executable, "-u", ROOT / "train.py", "--data", cohort, "--out", out, "--fold", "all", "--epochs", str(steps // 10),
                                    "--crop", "32", "32", "32", "--filters", "8", "--pool", "8", "--dim", "4", "--workers", "1", "--amp", "off"],
                                   stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        weights = {}
        for line in process.stdout:
            epoch = re.match(r"epoch (\d+)/", line)
            if epoch and int(epoch[1]) * 10 < steps:    # at the last one it is leaving already
                weights[int(epoch[1]) * 10] = weigh(process.pid)
        assert process.wait() == 0
    first, last = steps // 4, max(weights)
    growth = weights[last][0] / weights[first][0] - 1
    for step in (first, steps // 2, steps * 3 // 4, last):
        print(f"soak: after step {step}: {weights[step][0]:.1f} MB, {weights[step][1]} open files")
    print(f"soak: memory grew by {100 * growth:.2f} % from step {first} to {last}; open files from {weights[first][1]} to {weights[last][1]}")
    return int(growth > 0.02 or weights[last][1] > weights[first][1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, flag, default in (("fuzz", "--cases", 10_000), ("kill", "--kills", 100), ("soak", "--steps", 2_000)):
        command = commands.add_parser(name)
        command.add_argument(flag, type=int, default=default, dest="count")
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bad = fuzz(args.count, args.seed) if args.command == "fuzz" else kill(args.count // 2, args.seed) if args.command == "kill" else soak(args.count)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
