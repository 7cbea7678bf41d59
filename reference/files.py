"""Makes the vectors of crates/metal-candle/tests/data: tokenizers, chat templates and a LoRA
adapter, by the real tokenizers, transformers and PEFT.

    pip install -r reference/files.lock && python reference/files.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

import json
import sys
from pathlib import Path

from files import adapter, chat, tokens

FOLDER = Path(__file__).parent.parent / "crates/metal-candle/tests/data"


def write(name: str, value: object) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=0, separators=(",", ":"))
    (FOLDER / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    gguf = Path(sys.argv[1]).expanduser()
    FOLDER.mkdir(parents=True, exist_ok=True)
    write("smollm2_tokens.json", tokens.smollm2(gguf))
    write("tiny_tokenizers.json", tokens.tiny())
    write("chat.json", chat.cases(gguf))
    write("targets.json", adapter.targets())
    adapter.write(FOLDER / "peft_adapter")
