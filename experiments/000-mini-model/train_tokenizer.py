"""Train the byte-level BPE tokenizer of the embedded models on the train split of the built-in corpus.

    python train_tokenizer.py [--out DIR]

2048 entries, `<|endoftext|>` has id 0 and is bos, eos and unk token at once, as in GPT-2. Like GPT-2's, the tokenizer
does not put it in front of a text by itself.
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nsae_cli.assets import builtin_documents, model_dir

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
CONTEXT = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=model_dir("mini"), help="folder of the tokenizer files")
    args = parser.parse_args()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],  # special tokens come first: id 0
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(builtin_documents("train"), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )
    fast.save_pretrained(args.out)


if __name__ == "__main__":
    main()
