"""How well a model trained on moving shapes follows prompts: clips of held-out scenes, generated and judged.

    python examples/prompt_following.py [FOLDER] --count 200 --out following.jsonl --sheet following.png

FOLDER is a diffusers folder of an OpenSoraPlanPipeline (default: the built-in model). No combination of
colour, shape and motion in these scenes is in training data. --only "brown heart" asks for one thing alone,
--lora FILE for a LoRA that has learnt it. Verdicts are kept in --out: the same command goes on where it was
stopped. The judge is that of prompt_judge.py and is itself checked first.
"""

import argparse
import hashlib
import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from moving_shapes.captions import caption
from moving_shapes.drawing import render
from moving_shapes.scenes import Scene, scene_for, scene_of
from moving_shapes.writing import CAPTIONS
from PIL import Image, ImageDraw, ImageFont
from prompt_judge import ATTRIBUTES, KNOWN, KNOWN_AND_NEW, Looks, judge, right
from torch import Tensor
from tqdm import tqdm

from opensoraplan import builtin
from opensoraplan.device import resolve_device, resolve_dtype
from opensoraplan.fingerprint import fingerprint_weights
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.pipeline import OpenSoraPlanPipeline, VideoOutput
from opensoraplan.samplers import SOLVERS

LEAST_JUDGE = 0.99
# Of clips with (one object, two objects): what a model should reach in each attribute, and in all at once.
TARGETS = {1: {"colour": 0.95, "shape": 0.95, "motion": 0.95, "all": 0.90}, 2: {"all": 0.80}}
# Area of all other coloured things, in parts of a thing's; in drawn clips it stays below 0.002.
MOST_OTHERS = 0.01
# Seeds of scenes with one thing alone begin here: no clips to train on are rendered with them.
UNSEEN = 1_000_000
SHEET_CLIPS, SHEET_FRAMES, SHEET_COLUMNS = 12, 5, 2  # clips of the sheet: half with one object, half with two

Record = dict[str, Any]
Attributes = list[list[str]]  # of each thing: colour, shape, motion


@dataclass(frozen=True)
class Task:
    """A clip to make: scene number `index` of those with so many objects."""

    objects: int
    index: int
    scene: Scene
    prompt: str
    seed: int

    @property
    def key(self) -> tuple[int, int]:
        return self.objects, self.index

    @property
    def wanted(self) -> Attributes:
        return [[getattr(thing, name) for name in ATTRIBUTES] for thing in self.scene.things]


def make_tasks(count: int, seed: int, only: str | None) -> list[Task]:
    """`count` held-out scenes with one object, and as many with two, alternately; or `count` with `only` one
    thing, such as "brown heart".
    """
    tasks = []
    for index in range(count):
        for objects in (1, 2) if only is None else (1,):
            if only is None:
                scene = scene_for(index, seed=seed, held_out=True, objects=objects)
            else:
                scene = scene_of(only, index, seed=UNSEEN + seed)
            prompt = caption(scene, variant=index % CAPTIONS)
            clip_seed = (seed * 100_000 + index) * 2 + objects - 1
            tasks.append(Task(objects, index, scene, prompt, clip_seed))
    return tasks


def check_judge(tasks: list[Task], *, frames: int, height: int, width: int, looks: Looks) -> None:
    """Judge the same scenes as the renderer draws them; exit unless that is right nearly always."""
    counts = {objects: Counter[str]() for objects in sorted({task.objects for task in tasks})}
    for task in tqdm(tasks, desc="checking the judge", unit="clip"):
        drawn = render(task.scene, frames=frames, height=height, width=width)
        verdict = right(task.scene, judge(drawn, objects=task.objects, looks=looks))
        counts[task.objects].update(name for name, good in verdict.items() if good)
    for objects, count in counts.items():
        clips = sum(task.objects == objects for task in tasks)
        shares = {name: count[name] / clips for name in (*ATTRIBUTES, "all")}
        said = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        print(f"the judge on {clips} rendered clips with {objects} object{'s' * (objects > 1)}: {said}")
        if min(shares.values()) < LEAST_JUDGE:
            raise SystemExit(
                f"at {frames} x {height} x {width} the judge is right in {min(shares.values()):.1%} of "
                f"rendered clips, below {LEAST_JUDGE:.0%}: its verdicts would say little. Try 25 x 96 x 128"
            )


def fingerprint(folder: Path) -> str:
    """Changes with any file of the model."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def read_records(path: Path, settings: Record) -> dict[tuple[int, int], Record]:
    """What was judged with these very settings, by (objects, index); half a last line is passed over."""
    records: dict[tuple[int, int], Record] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["settings"] == settings:
                records[record["objects"], record["index"]] = record
    return records


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """The file to add lines to, after whatever is in it; half a last line is ended."""
    try:
        whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("" if whole else "\n")
            yield file
    except OSError as error:
        raise SystemExit(f"cannot write the verdicts to {path}: {error.strerror}") from None


def generate(
    pipeline: OpenSoraPlanPipeline,
    tasks: list[Task],
    negative: PromptEmbeds | None,
    options: argparse.Namespace,
) -> Tensor:
    """Clips uint8 [B, T, H, W, 3] of the tasks' prompts; `negative` is of one prompt, for all."""
    output = pipeline(
        [task.prompt for task in tasks],
        negative_prompt_embeds=negative,
        num_frames=options.frames,
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        solver=options.solver,
        guidance_scale=options.guidance,
        guidance_rescale=options.guidance_rescale,
        batched_guidance=True,
        seed=[task.seed for task in tasks],
        output_type="pt",
    )
    assert isinstance(output, VideoOutput)
    assert isinstance(output.frames, Tensor)
    return (output.frames.cpu() * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)


def judged(task: Task, clip: Tensor, settings: Record, looks: Looks) -> Record:
    """The line of --out for a clip."""
    verdicts = judge(clip, objects=task.objects, looks=looks)
    return {
        "objects": task.objects,
        "index": task.index,
        "prompt": task.prompt,
        "seed": task.seed,
        "wanted": task.wanted,
        "seen": [[getattr(verdict, name) for name in ATTRIBUTES] for verdict in verdicts],
        "others": max(verdict.others for verdict in verdicts),
        "settings": settings,
    }


def matches(wanted: Attributes, seen: Attributes) -> dict[str, bool]:
    """Which attributes are right of all things, each on its side; "all": every one."""
    result = {
        name: all(want[place] == see[place] for want, see in zip(wanted, seen, strict=True))
        for place, name in enumerate(ATTRIBUTES)
    }
    return result | {"all": wanted == seen}


def table(records: list[Record]) -> str:
    """Shares of what is right, and which targets are reached."""
    names = (*ATTRIBUTES, "all")
    pairs = {
        objects: [(r["wanted"], r["seen"]) for r in records if r["objects"] == objects] for objects in (1, 2)
    }
    each = [([want], [see]) for w, s in pairs[2] for want, see in zip(w, s, strict=True)]
    lines = [f"{'':<34}{'of':>6}" + "".join(f"{name:>10}" for name in names)]
    missed = []
    for title, objects, rows in (
        ("one object", 1, pairs[1]),
        ("two objects: each", None, each),
        ("two objects: both, on their sides", 2, pairs[2]),
    ):
        if not rows:
            continue
        results = [matches(want, see) for want, see in rows]
        shares = {name: sum(result[name] for result in results) / len(rows) for name in names}
        lines.append(f"{title:<34}{len(rows):>6}" + "".join(f"{shares[name]:>10.1%}" for name in names))
        for name, target in TARGETS.get(objects or 0, {}).items():
            if shares[name] < target:
                missed.append(f"{title}, {name}: {shares[name]:.1%} of {target:.0%}")
    # The judge names something in any picture, but only a clean one has nothing else in it.
    clean = sum(record["others"] < MOST_OTHERS for record in records) / len(records)
    lines.append(f"with nothing else in the picture: {clean:.1%} (drawn clips: 100%)")
    lines.append("missed: " + "; ".join(missed) if missed else "every target is reached")
    return "\n".join(lines)


def failures(records: list[Record], *, examples: int) -> str:
    """The most frequent mix-ups, and some clips that went wrong."""
    mixed = Counter(
        f"{name}: {want[place]} came out as {see[place]}"
        for record in records
        for want, see in zip(record["wanted"], record["seen"], strict=True)
        for place, name in enumerate(ATTRIBUTES)
        if want[place] != see[place]
    )
    wrong = [record for record in records if record["wanted"] != record["seen"]]
    lines = [f"{len(wrong)} of {len(records)} clips are not right in all"]
    lines += [f"  {count:>4} times {what}" for what, count in mixed.most_common(examples)]
    for record in wrong[:examples]:
        seen = " | ".join(" ".join(thing) for thing in record["seen"])
        lines.append(f"  seed {record['seed']}: {record['prompt']}\n      looks like: {seen}")
    return "\n".join(lines)


def draw_sheet(clips: list[tuple[Task, Tensor, Record]], path: Path) -> None:
    """A picture with some frames of each clip below its prompt: black if it is right, red if not."""
    font = ImageFont.load_default(size=12)
    count, height, width = clips[0][1].shape[:3]
    places = [round(place * (count - 1) / (SHEET_FRAMES - 1)) for place in range(SHEET_FRAMES)]
    text, gap = 34, 10
    across, down = SHEET_FRAMES * width, height + text
    rows = math.ceil(len(clips) / SHEET_COLUMNS)
    size = (SHEET_COLUMNS * (across + gap) + gap, rows * (down + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (task, clip, record) in enumerate(clips):
        left = gap + number % SHEET_COLUMNS * (across + gap)
        top = gap + number // SHEET_COLUMNS * (down + gap)
        good = record["wanted"] == record["seen"]
        words = "\n".join(textwrap.wrap(task.prompt, across // 7, max_lines=2, placeholder=" ..."))
        draw.text((left, top), words, font=font, fill="black" if good else "#c00000")
        strip = torch.cat([clip[place] for place in places], dim=1)
        sheet.paste(Image.fromarray(strip.numpy()), (left, top + text))
    sheet.save(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="default: the built-in model")
    parser.add_argument("--count", type=int, default=200, help="scenes with one object, and as many with two")
    parser.add_argument("--only", help='one thing in all scenes, such as "brown heart"')
    parser.add_argument("--lora", type=Path, help="LoRA to use at strength 1")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--solver", choices=SOLVERS, default="euler")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--guidance-rescale", type=float, default=0.7)
    parser.add_argument("--batch", type=int, default=8, help="clips at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of their noise")
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--device", help="cpu, cuda, npu; default: the best there is")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("prompt_following.jsonl"), help="the verdicts")
    parser.add_argument("--sheet", type=Path, help="a png of the first clips")
    parser.add_argument("--examples", type=int, default=10, help="how many failures to print")
    return parser.parse_args()


def main() -> None:
    """Check the judge, generate what is missing, print the table."""
    options = parse()
    if options.count < 1 or options.batch < 1:
        raise SystemExit(f"--count and --batch must be at least 1, got {options.count} and {options.batch}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = options.folder or builtin.folder()
    if not (folder / "model_index.json").is_file():
        raise SystemExit(f"{folder} is not a diffusers folder: it has no model_index.json")
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)

    tasks = make_tasks(options.count, options.seed, options.only)
    looks = KNOWN if options.only is None else KNOWN_AND_NEW
    combinations = {tuple(thing) for task in tasks for thing in task.wanted}
    print(f"{len(tasks)} scenes, {len(combinations)} combinations of colour, shape and motion in them")
    check_judge(tasks, frames=options.frames, height=options.height, width=options.width, looks=looks)

    asked = ("steps", "solver", "guidance", "guidance_rescale", "seed", "frames", "height", "width", "dtype")
    settings: Record = {"model": fingerprint(folder), **{name: getattr(options, name) for name in asked}}
    if options.only is not None:
        settings["only"] = options.only
    if options.lora is not None:
        settings["lora"] = fingerprint_weights(options.lora)
    records = read_records(options.out, settings)
    for_sheet = {task.key for task in tasks[:SHEET_CLIPS]} if options.sheet else set()
    todo = [task for task in tasks if task.key not in records or task.key in for_sheet]
    done = sum(task.key in records for task in tasks)
    print(f"{done} of {len(tasks)} clips were judged before, {len(todo)} to make" if done else f"{folder}")

    shown: list[tuple[Task, Tensor, Record]] = []
    if todo:
        with appending(options.out) as file:
            pipeline = OpenSoraPlanPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
            if options.lora is not None:
                pipeline.transformer.load_lora_adapter(options.lora)
            pipeline.to(device)
            pipeline.set_progress_bar_config(disable=True)
            kept = pipeline.prompt_settings
            against = textwrap.shorten(kept.negative_prompt, 40)
            print(f"prompts: template {kept.template!r}, negative {against!r}, clean {kept.clean}")
            negative = pipeline.encode_prompts([""], negative=True) if options.guidance > 1 else None
            with tqdm(total=len(todo), desc="clips", unit="clip") as progress:
                for start in range(0, len(todo), options.batch):
                    batch = todo[start : start + options.batch]
                    clips = generate(pipeline, batch, negative, options)
                    for task, clip in zip(batch, clips, strict=True):
                        record = judged(task, clip, settings, looks)
                        if task.key not in records:
                            file.write(json.dumps(record) + "\n")
                            file.flush()
                        records[task.key] = record
                        if task.key in for_sheet:
                            shown.append((task, clip, record))
                    progress.update(len(batch))

    wanted = [records[task.key] for task in tasks]
    print(table(wanted))
    print(failures(wanted, examples=options.examples))
    if shown:
        draw_sheet(shown, options.sheet)
        print(f"wrote {options.sheet}")


if __name__ == "__main__":
    main()
