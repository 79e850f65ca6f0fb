"""Whether math-verify finds two expressions equal, within bounds on what it may write out."""

import functools
import math
import re

from ssd.grading import answers
from ssd.grading.quantities import TRIGONOMETRIC

MAX_EXPRESSION_CHARS = 400
MAX_BITS = 200_000
MAX_EXPANDED_EXPONENT = 64


def same_expression(gold: str, answer: str, tolerance: float = 0.0) -> bool:
    """Whether math-verify finds two LaTeX expressions, or the last one in a sentence, equal, or their values near."""
    import math_verify
    import sympy
    from math_verify.grader import should_treat_as_complex

    is_complex = should_treat_as_complex(gold) or should_treat_as_complex(answer)
    is_sentence = answers.is_sentence(answer)
    one = parsed(gold, is_complex, lowercase=is_sentence)  # as math-verify parses what it finds in a sentence
    if one is None:
        return False
    if is_sentence:
        found = math_verify.parse(answer, parsing_timeout=None, fallback_mode="no_fallback")
        other = found[0] if found else None
    else:
        other = parsed(answer, is_complex)
    if other is None:
        return False
    if type(one) is type(other) and one == other:
        return True
    if max(_log2(one), _log2(other)) > MAX_BITS:
        return False
    if is_complex:
        one, other = (each.subs({s: sympy.I for s in each.free_symbols if s.name == "i"}) for each in (one, other))
    are_numbers = all(getattr(each, "is_number", False) for each in (one, other))
    if tolerance and are_numbers and abs((one - other).evalf()) <= tolerance * (1 + 1e-9):
        return True
    if not math_verify.verify(one, other, allow_set_relation_comp=True, timeout_seconds=None):
        return False
    # math-verify rounds differences away that are all there is to small numbers.
    if not are_numbers or 0 in (one, other):
        return True
    difference = (one - other).doit()
    if difference.is_Rational:
        return difference == 0
    return bool(abs((one / other).doit().evalf(8) - 1) < 1e-4)


# To the parser the first are 1; it drops primes and bases, writes out binomials as it reads, and is lost in bars.
_MISREAD = re.compile(r"\\(?:gcd|lcm)|'|(?<![\^\d])\d+_|\\[dt]?binom\{[^{}]*(?:\d{5}|\^)|\|(?:[^|]*\|){9}", re.DOTALL)


@functools.lru_cache(maxsize=4096)
def parsed(latex: str, is_complex: bool, lowercase: bool = False):
    """sympy expression of `latex`, nothing in it evaluated; None where it has none or no value."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from latex2sympy2_extended.math_normalization import normalize_latex

    if len(latex) > MAX_EXPRESSION_CHARS or _MISREAD.search(latex):
        return None
    # Units and boxes are gone by now; here `units` would take the letter off `5c`.
    form = NormalizationConfig(True, False, True, True, "none", False)
    try:
        degrees = TRIGONOMETRIC.search(latex) is not None
        expression = latex2sympy(
            normalize_latex(latex, form),
            is_real=not is_complex,
            convert_degrees=degrees,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=lowercase),
        )
        return None if expression in (sympy.zoo, sympy.nan) else expression
    except Exception:  # antlr's errors have no common class but this one
        return None


def _log2(expression) -> float:
    """A bound on the bits of the largest number that evaluation of `expression` would write out."""
    import sympy

    bits = [_log2(part) for part in getattr(expression, "args", ())]
    largest = max(bits, default=1.0)
    if isinstance(expression, sympy.Rational):
        return float(max(abs(expression.p).bit_length(), expression.q.bit_length()))
    if isinstance(expression, sympy.Pow | sympy.exp):
        base, exponent = expression.as_base_exp()
        if base.is_Add and base.free_symbols and _log2(exponent) > math.log2(MAX_EXPANDED_EXPONENT):
            return math.inf
        return largest * 2.0 ** bits[-1] if bits[-1] < 64 else math.inf
    if isinstance(expression, sympy.factorial):
        return largest * 2.0**largest if largest < 64 else math.inf
    if isinstance(expression, sympy.Sum | sympy.Product):
        return math.inf if any(_log2(limit) > 14 for limit in expression.limits) else largest
    return sum(bits) if isinstance(expression, sympy.Mul) else largest + math.log2(1 + len(bits))
