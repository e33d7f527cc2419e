"""Renders captioned clips of moving shapes, which the built-in model is trained on: clips for those without.

    python examples/render_clips.py FOLDER --count 100

Stopping, continuing, sharing the work between processes and mistakes are as in the verbs of `osp`.
"""

from opensoraplan import cli


def main() -> None:
    cli.main(_run, program="render_clips.py")


def _run(words: list[str]) -> None:
    from moving_shapes.command import run

    run(words)


if __name__ == "__main__":
    main()
