#!/usr/bin/env python3
"""Prepare a corpus: train or build its tokenizer, encode every split, and print what was counted."""

import argparse
import logging
import sys

EPILOG = """examples:
  python scripts/prepare_data.py --corpus builtin --tokenizer bpe --vocab-size 2048 --output data/builtin
  python scripts/prepare_data.py --corpus wikitext-103 --data-dir DIR --tokenizer word_level --output data/wikitext-103
  python scripts/prepare_data.py --corpus text --data-dir DIR --tokenizer bpe --vocab-size 16384 --output data/mine

DIR holds wiki.{train,valid,test}.tokens for WikiText (which otherwise comes from the hub), and {train,valid,test}.txt or
.txt.xz for `text`. A recipe takes the result as `data.corpus=prepared data.data_dir=OUTPUT`.

exit codes: 0 done; 2 a mistake in the call or the data; 130 stopped by SIGINT. OUTPUT is written whole or not at all.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="prepare_data", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True, help="builtin, text, wikitext-103, wikitext-2, or either with -raw")
    parser.add_argument("--data-dir", help="where the text is")
    parser.add_argument(
        "--tokenizer", required=True, help="bpe, word_level, sentencepiece, or a folder with a tokenizer"
    )
    parser.add_argument("--vocab-size", type=int, help="entries to train; word_level takes all words without it")
    parser.add_argument("--output", required=True, help="a new folder")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="prepare_data: %(message)s")
    logging.getLogger("deq_lm").setLevel(logging.INFO)  # progress

    # transformers takes seconds to import, which --help and a mistyped option need not wait for
    from deq_lm.data.corpora import PUBLISHED_WORDS
    from deq_lm.data.encoding import DataConfig, prepare_into
    from deq_lm.errors import ConfigError, DataError, in_one_line

    try:
        config = DataConfig(
            corpus=arguments.corpus,
            data_dir=arguments.data_dir,
            tokenizer=arguments.tokenizer,
            vocab_size=arguments.vocab_size,
        )
        encoded = prepare_into(config, arguments.output)
    except (ConfigError, DataError, OSError) as error:
        print(f"prepare_data: {in_one_line(str(error))}", file=sys.stderr)
        return 2
    published = PUBLISHED_WORDS.get(config.corpus, {})
    header = f"{'split':<8}{'tokens':>14}{'words':>14}{'bytes':>16}{'unknown':>12}"
    print(header + (f"{'published words':>18}" if published else ""))
    for name, split in encoded.splits.items():
        row = f"{name:<8}{split.num_tokens:>14,}{split.num_words:>14,}{split.num_bytes:>16,}{split.num_unknown:>12,}"
        print(row + (f"{published[name]:>18,}" if published else ""))
    print(f"vocabulary {len(encoded.tokenizer):,}, in {arguments.output}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
