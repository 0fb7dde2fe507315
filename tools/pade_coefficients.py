"""Print fgvc/spectral/pade_coefficients.py: the diagonal [50/50] Padé approximant of 1 / (1 - r) at 20 digits.

    pip install mpmath==1.3.0
    python tools/pade_coefficients.py > fgvc/spectral/pade_coefficients.py

As published (Song, Sebe, Wang, ICCV 2021): Taylor coefficients by numerical differentiation, then a linear system for
the coefficients of P and Q, both by mpmath. With exact Taylor coefficients (all one) the system is singular, since
1 / (1 - r) is its own [0/1] approximant; the noise of 20 digits, about 1e-21, decides which solution appears.
"""

import textwrap

import mpmath

DIGITS = 20
DEGREE = 50


def coefficients(degree: int = DEGREE, digits: int = DIGITS) -> tuple[list[float], list[float]]:
    """Numerator and denominator, constant term first, rounded to float64."""
    with mpmath.workdps(digits):
        taylor = mpmath.taylor(lambda r: 1 / (1 - r), 0, 2 * degree)
        numerator, denominator = mpmath.pade(taylor, degree, degree)
        return [float(c) for c in numerator], [float(c) for c in denominator]


def main() -> None:
    numerator, denominator = coefficients()
    print('"""Written by tools/pade_coefficients.py (mpmath, 20 digits); not to be edited. Constant term first."""\n')
    print("# fmt: off")
    for name, values in (("NUMERATOR", numerator), ("DENOMINATOR", denominator)):
        print(f"{name}: tuple[float, ...] = (")
        print(textwrap.indent(textwrap.fill(", ".join(map(repr, values)), 116, break_on_hyphens=False), "    "))
        print(")")


if __name__ == "__main__":
    main()
