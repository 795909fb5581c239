"""A Hugging Face directory as a Megatron checkpoint: `asympo convert hf-to-megatron SRC DST [a.b=c ...]`."""

import sys

from asympo_megatron.cli.main import main

sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
