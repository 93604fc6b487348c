"""A recipe: a corpus cleaned by datatrove, here or on Slurm, and then made into our token shards.

    pip install datatrove orjson
    python docs/clean_with_datatrove.py crawl/ clean/ --tasks=64                      # on this machine
    python docs/clean_with_datatrove.py crawl/ clean/ --tasks=64 --partition=cpu      # a Slurm array
    sbatch --array=1-64 --wrap="python prepare_data.py --source=clean/ --out_dir=data/clean"

The last line is for when all tasks are done; with --dependency=afterok:ID of the array it may come before.
Each task reads its share of the .jsonl, .jsonl.gz or .jsonl.zst files, and writes one file. What datatrove's
other blocks filter, extract or deduplicate goes into `steps`. A finished task is not run again. It is marked
by its number alone, so other settings need another folder.
"""

import argparse
import json
import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


def steps(source: str, out: str, least_words: int) -> list:
    """What each task does with each document."""
    return [
        JsonlReader(source, glob_pattern="**/*.jsonl*"),
        LambdaFilter(lambda document: len(document.text.split()) >= least_words),
        JsonlWriter(out, output_filename="${rank}.jsonl.gz"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Clean a corpus with datatrove.")
    parser.add_argument("source", help="a folder of .jsonl files, compressed or not, with a field text")
    parser.add_argument("out", help="a folder for the clean files")
    parser.add_argument("--tasks", type=int, default=8, help="shares of the files")
    parser.add_argument("--least_words", type=int, default=50, help="shorter documents are left out")
    parser.add_argument("--partition", default="", help="of Slurm; empty to work on this machine")
    parser.add_argument("--time", default="4:00:00", help="that Slurm gives a task")
    options = parser.parse_args()
    source, out = options.source.rstrip("/"), options.out.rstrip("/")
    logs, settings = Path(f"{out}.logs"), [source, options.tasks, options.least_words]
    note = logs / "settings.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        sys.exit(
            f"error: {out} was made with other settings, see {note}; delete both folders, or name another"
        )
    logs.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(settings))
    work, places = steps(source, out, options.least_words), {"logging_dir": str(logs)}
    if options.partition:
        slurm = {"partition": options.partition, "time": options.time, "job_name": "clean"}
        SlurmPipelineExecutor(work, tasks=options.tasks, **slurm, **places).run()
    else:
        LocalPipelineExecutor(work, tasks=options.tasks, **places).run()


if __name__ == "__main__":
    main()
