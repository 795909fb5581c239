"""A Megatron checkpoint as a Hugging Face directory: `asympo convert megatron-to-hf SRC DST`."""

import sys

from asympo_megatron.cli.main import main

sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
