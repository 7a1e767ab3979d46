"""What each part of augmented attention adds to a FLASH trained from scratch: Linearized-LLM's Table 15, but smaller.

    python benchmarks/flash.py --out DIRECTORY [--at-once N] [--vocabulary N] [--variants NAME ...] [CHANGE ...]

Every variant is the recipe `flash-small`, with CHANGEs such as `data.train.source=FILE.txt`, in a process of its own;
N of them at once, on one GPU or on none. The same seed, so the same initial weights where variants share them, and the
same tokens in the same order. `--vocabulary` makes a byte-level BPE of so many tokens from the training data, which
must be a text file or `builtin:train`, in place of the recipe's tokenizer. A run that was interrupted goes on. Writes
`flash.json` and `flash.md`.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from linearize.convert.context import read_state
from linearize.recipes.corpora import BUILTIN_DATA
from linearize.recipes.loader import load_recipe

# Name -> what differs from all branches together, and what was published for 110M parameters on PG-19.
VARIANTS = {
    "local": (["attention.feature_map=null", "attention.conv_taps=0"], 16.65),
    "local + group": (["attention.conv_taps=0"], 16.14),
    "group": (["attention.window=null", "attention.conv_taps=0"], 35.25),
    "quadratic": (["attention=null"], 15.40),
    "local + group + conv": ([], 15.16),
}
# Of a loss curve's end, whose mean is told.
LAST_STEPS = 20


def make_tokenizer(changes: list[str], size: int, directory: Path) -> Path:
    """A byte-level BPE of `size` tokens from the recipe's training data."""
    sources = load_recipe("flash-small", changes).data.train
    files = [str(BUILTIN_DATA.get(source.source, source.source)) for source in sources]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train(files, vocab_size=size, special_tokens=["<eos>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<eos>").save_pretrained(directory)
    return directory


def train(name: str, changes: list[str], directory: Path) -> dict:
    """One variant's figures."""
    run = directory / name.replace(" ", "").replace("+", "-")
    command = [sys.executable, "-m", "linearize.cli", "convert", "flash-small", *changes, *VARIANTS[name][0]]
    with (directory / f"{run.name}.log").open("w") as log:
        code = subprocess.run(
            [*command, "--out", run, "--launch", "none", "--resume"], stdout=log, stderr=log
        ).returncode
    if code:
        raise SystemExit(f"{name}: ended with {code}; {log.name} says why")
    trained, measured = (read_state(run / stage)["metrics"] for stage in ("finetune", "evaluate"))
    text = measured["models"]["after finetune"]["text"]
    losses = trained["loss"][-LAST_STEPS:]
    return {
        "variant": name,
        **{f"perplexity @{length}": figures["perplexity"] for length, figures in text.items()},
        "training loss": sum(losses) / len(losses),
        "parameters": trained["trained_parameters"],
        "minutes": trained["seconds"] / 60,
        "published, 110M on PG-19": VARIANTS[name][1],
    }


def table(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="CHANGE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=len(VARIANTS))
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    changes = arguments.changes
    if arguments.vocabulary:
        tokenizer = make_tokenizer(changes, arguments.vocabulary, arguments.out / "tokenizer")
        changes = [*changes, f"model.tokenizer={tokenizer.resolve()}"]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        rows = list(pool.map(lambda name: train(name, changes, arguments.out), arguments.variants))
    (arguments.out / "flash.json").write_text(json.dumps({"changes": changes, "rows": rows}, indent=2) + "\n")
    (arguments.out / "flash.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
