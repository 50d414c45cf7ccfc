"""Is a reply written in the language of its question? Called by teacher.judge.

Two cheap signs: the script of the letters, and for Latin script the most frequent function words. Both stay silent when there is too
little text to tell: a derivation in symbols has no language.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache

FEWEST_LETTERS = 20
FEWEST_WORDS = 6
FOREIGN_SHARE = 0.3

TABLE = """
English: the of and is are was to that it with for this have has from each there how what which by they
German: der die das und ist sind nicht ein eine mit für von auf den dem wir sich auch wie dass pro noch
French: le la les des et est sont une pas que pour dans avec du au sur il nous donc chaque combien ce
Spanish: el la los las y es son una por que para con del se hay cada entonces cuántos como está lo
Portuguese: o os as e é são uma por que para com do da não há cada então quantos como está em
Italian: il lo gli e è sono una per che con del della non ogni quindi quanti come si di ci
Dutch: de het een en is zijn niet van voor met op dat wij elke dus hoeveel als er ook aan
"""
FUNCTION_WORDS = {name: frozenset(words.split()) for name, words in (line.split(": ") for line in TABLE.strip().splitlines())}
LANGUAGES = {
    word: [name for name, words in FUNCTION_WORDS.items() if word in words] for word in frozenset().union(*FUNCTION_WORDS.values())
}


def foreign(question: str, reply: str) -> str | None:
    """What the reply is written in when that is not the language of the question; None when it fits or cannot be told."""
    script = _foreign_script(question, reply)
    if script:
        return script
    found = _latin_language(reply)
    own = _latin_language(question, FEWEST_WORDS // 2) if found else None
    return found if own and own != found else None


def _foreign_script(question: str, reply: str) -> str | None:
    if question.isascii() and reply.isascii():
        return None
    own, found = _scripts(question), _scripts(reply)
    letters = sum(found.values())
    if not own or letters < FEWEST_LETTERS:
        return None
    strange = Counter({script: count for script, count in found.items() if script not in own})
    return strange.most_common(1)[0][0].title() + " script" if sum(strange.values()) > FOREIGN_SHARE * letters else None


def _scripts(text: str) -> Counter[str]:
    """Letters by script; signs of mathematics (Greek, letter-like) belong to none."""
    scripts = Counter(_script(letter) for letter in text if letter.isalpha())
    return Counter(
        {script: count for script, count in scripts.items() if script not in ("GREEK", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT")}
    )


@cache
def _script(letter: str) -> str:
    script = unicodedata.name(letter, "UNKNOWN").split()[0]
    return "JAPANESE" if script in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else script


def _latin_language(text: str, fewest: int = FEWEST_WORDS) -> str | None:
    """The language whose function words stand out: at least `fewest` of them, and twice as many as of any other."""
    hits = Counter(language for word in re.findall(r"[^\W\d_]+", text.lower()) for language in LANGUAGES.get(word, ()))
    (language, most), (_, second) = (*hits.most_common(2), ("", 0), ("", 0))[:2]
    return language if most >= fewest and most >= 2 * second else None
