"""The words after the colon of --config=FILE:WORD,WORD."""

from collections.abc import Iterable


def choose(arguments: str, file: str, *kinds: tuple[str, Iterable[str]]) -> tuple[str, ...]:
    """Returns one word of each kind: that of the arguments, else the default.

    Args:
        arguments: words with commas between them, in any order.
        file: path of the config file, for the error.
        kinds: the default and all words of each kind.

    Raises:
        ValueError: a word is of no kind.
    """
    chosen = [default for default, _ in kinds]
    all_words = [list(words) for _, words in kinds]
    for argument in filter(None, arguments.split(",")):
        kind = next((i for i, words in enumerate(all_words) if argument in words), None)
        if kind is None:
            raise ValueError(
                f"an argument of {file} is {argument!r}: make it one of "
                f"{', '.join(word for words in all_words for word in words)}"
            )
        chosen[kind] = argument
    return tuple(chosen)
