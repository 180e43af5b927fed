"""`make demo`: build a small model of random weights, save it, load it back and generate in a batch.

It shows that everything works on this machine; it does not show what a trained model writes. Takes seconds.
"""

import tempfile
import time
from pathlib import Path

import torch

from hymba.config import HymbaConfig
from hymba.engine.llm import LLM
from hymba.engine.sampling import SamplingParams
from hymba.model.hymba import Hymba
from hymba.tokenizer import Tokenizer

TEXTS = Path(__file__).resolve().parents[1] / "data" / "austen"
PROMPTS = ["It is a truth universally acknowledged", "Emma Woodhouse, handsome, clever, and rich", "Elinor", "No one"]
VOCAB_SIZE = 1024


def main() -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(TEXTS.glob("*.txt")) if path.stem != "persuasion"]
    print(f"1. a byte-level BPE of {VOCAB_SIZE} tokens, trained on {sum(map(len, texts)):,} characters of Jane Austen")
    tokenizer = Tokenizer.train(texts, VOCAB_SIZE)
    torch.manual_seed(0)
    model = Hymba(HymbaConfig.preset("mini", vocab_size=tokenizer.vocab_size))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"2. a model of {count / 1e6:.1f} M random parameters, every part of the architecture in it")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(f"3. saved in the official layout: {', '.join(sorted(path.name for path in Path(folder).iterdir()))}")
        llm = LLM(folder)
    print(f"4. loaded back; {len(PROMPTS)} prompts of different lengths in one batch:\n")
    began = time.perf_counter()
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=24, seed=0, ignore_eos=True))
    seconds = time.perf_counter() - began
    for output in outputs:
        print(f"   {output.prompt} |{' '.join(output.text.split())}")
    tokens = sum(len(output.token_ids) for output in outputs)
    print(f"\n{tokens} tokens in {seconds:.1f} s. The weights are UNTRAINED: what follows the bars is noise.")


if __name__ == "__main__":
    main()
