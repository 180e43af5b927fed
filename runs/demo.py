"""`make demo`: four beginnings, continued together by the small model that the package ships. Takes seconds."""

import time

from hymba.engine.llm import LLM
from hymba.engine.sampling import SamplingParams
from hymba.shipped import SHIPPED_MODEL

PROMPTS = ["It is a truth", "Emma Woodhouse, handsome, clever, and rich", "Elinor", "No one who had ever seen"]


def main() -> None:
    llm = LLM()
    count = sum(parameter.numel() for parameter in llm.model.parameters())
    print(f"{SHIPPED_MODEL}: {count / 1e6:.1f} M parameters, trained on five novels of Jane Austen\n")
    began = time.perf_counter()
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=80, temperature=0.8, seed=1))
    seconds = time.perf_counter() - began
    for output in outputs:
        print(f"{output.prompt} |{output.text}\n")
    tokens = sum(len(output.token_ids) for output in outputs)
    print(f"{tokens} tokens in {seconds:.1f} s. Your turn: hymba generate 'My dear Mr. Bennet'")


if __name__ == "__main__":
    main()
