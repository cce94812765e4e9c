"""Reference Cholesky factors of HOLD's covariance in 50-digit arithmetic, printed as the dict that the tests freeze.

    python bench/hold_digits50.py

Independent of hold_ref.py: cov = L_inv I + exp(F t) (S0 - L_inv I) exp(F t)^T with a plain Taylor series for exp(F t).
The subtraction loses up to some 40 digits at small t, so the work is done with 150 and shown with 20.
"""

import sys

try:
    import mpmath as mp
except ImportError:
    sys.exit("this script wants mpmath: pip install mpmath")

mp.mp.dps = 150
CASES = {
    1: ("1e-5", "1e-3", "0.1", "1", "3", "6"),
    2: ("1e-5", "1e-3", "0.1", "1", "3", "6"),
    3: ("1e-5", "1e-3", "0.1", "1", "3", "6"),
    4: ("0.02", "0.1", "1", "3", "6"),
    5: ("0.02", "0.1", "1", "3", "6"),
    6: ("0.02", "0.1", "1", "3", "6"),
}


def cholesky(n, t):
    """Lower factor of cov(t) at critical damping, alpha and L_inv as in HOLD()."""
    alpha, L_inv = mp.mpf("0.04"), mp.mpf(1)
    lam2 = mp.mpf(max(2 * n - 3, 1))
    F = mp.zeros(n)
    for i in range(1, n):
        gamma = mp.sqrt(lam2 * (n**2 - i**2) / (4 * i**2 - 1))  # gamma_{n-i}
        F[n - i - 1, n - i], F[n - i, n - i - 1] = gamma, -gamma
    F[n - 1, n - 1] = -n * mp.sqrt(lam2)
    E = term = mp.eye(n)
    for k in range(1, 900):
        term = term * F * t / k
        E = E + term
    S0 = alpha * L_inv * mp.eye(n)
    S0[0, 0] = 0
    cov = L_inv * mp.eye(n) + E * (S0 - L_inv * mp.eye(n)) * E.T
    return mp.cholesky(cov)


if __name__ == "__main__":
    print("DIGITS50 = {  # (n, t): rows of the lower factor, row by row")
    for n, times in CASES.items():
        for t in times:
            L = cholesky(n, mp.mpf(t))
            entries = ", ".join(mp.nstr(L[i, j], 20) for i in range(n) for j in range(i + 1))
            print(f"    ({n}, {t}): [{entries}],")
    print("}")
