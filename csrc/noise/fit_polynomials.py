"""Derives the polynomial coefficients of normal.h (needs numpy and scipy; not part of the build).

Each polynomial is a weighted minimax fit, found as a linear programme on Chebyshev nodes. The coefficients are then
rounded to float32 one by one, lowest power first, refitting the remaining ones after each; a last search moves every
coefficient by a few units in the last place and keeps what lowers the error of the float32 evaluation itself. Prints C
hex floats and the errors.
"""

import itertools

import numpy as np
from scipy.optimize import linprog

F64 = np.ndarray


def minimax(x: F64, target: F64, weight: F64, powers: list[int]) -> tuple[F64, float]:
    """Coefficients c that minimise max |weight * (target - sum c_j x^powers_j)|, and that error."""
    basis = np.stack([x**p for p in powers], 1) * weight[:, None]
    scale, unit = np.abs(basis).max(0), 1e-8  # the solver's tolerances are absolute: bring the problem to order one
    basis, goal = basis / scale / unit, target * weight / unit
    slack = np.ones((len(x), 1))
    cost = np.zeros(len(powers) + 1)
    cost[-1] = 1.0
    bounds = [(None, None)] * len(powers) + [(0, None)]
    rows = np.vstack([np.hstack([basis, -slack]), np.hstack([-basis, -slack])])
    result = linprog(cost, A_ub=rows, b_ub=np.concatenate([goal, -goal]), bounds=bounds, method="highs")
    return result.x[:-1] / scale, result.x[-1] * unit


def fma(a: F64 | float, b: F64 | float, c: F64 | float) -> F64:
    """float32 fma through float64: the product is exact, so only ties of a double rounding could differ."""
    return (np.float64(a) * b + c).astype(np.float32).astype(np.float64)


def horner(coefs: list[float], x: F64) -> F64:
    acc = np.full_like(x, coefs[-1])
    for c in reversed(coefs[:-1]):
        acc = fma(acc, x, c)
    return acc


def round_coefs(x: F64, target: F64, weight: F64, num_coefs: int, fixed: dict[int, float]) -> list[float]:
    """float32 coefficients, `fixed` ones kept, the others rounded in ascending order of their power."""
    done = dict(fixed)
    for power in range(num_coefs):
        if power in done:
            continue
        rest = [p for p in range(num_coefs) if p not in done]
        known = sum((c * x**p for p, c in done.items()), np.zeros_like(x))
        free, _ = minimax(x, target - known, weight, rest)
        done[power] = float(np.float32(free[0]))
    return [done[p] for p in range(num_coefs)]


def polish(coefs: list[float], error, movable: list[int]) -> tuple[list[float], float]:
    """Coordinate and pair moves of up to 3 ulp while the float32 error falls."""
    best, best_error = list(coefs), error(coefs)
    improved = True
    while improved:
        improved = False
        for i, j in itertools.combinations_with_replacement(movable, 2):
            for di, dj in itertools.product(range(-3, 4), repeat=2):
                trial = list(best)
                trial[i] += di * float(np.spacing(np.float32(trial[i])))
                trial[j] += (dj if j != i else 0) * float(np.spacing(np.float32(trial[j])))
                e = error(trial)
                if e < best_error * (1 - 1e-6):
                    best, best_error, improved = trial, e, True
    return best, best_error


def show(name: str, coefs: list[float], error: float) -> None:
    print(f"{name}: max error {error:.3e}")
    for power, c in enumerate(coefs):
        value = float(np.float32(c)).hex()
        print(f"    x^{power}: {value}f  // {np.float32(c)!r}")


def main() -> None:
    k = np.cos(np.pi * (np.arange(1200) + 0.5) / 1200)
    dense = np.random.default_rng(0).uniform(-1, 1, 20000)
    f32 = lambda v: v.astype(np.float32).astype(np.float64)  # noqa: E731

    # -2 ln(1 - f) = f * Q(f), 1 - f in [sqrt(1/2), sqrt(2)); the error that counts is the one of r = sqrt(-2 ln u).
    low, high = 1 - np.sqrt(2.0), 1 - np.sqrt(0.5)
    span = lambda v: (low + high) / 2 + (high - low) / 2 * v  # noqa: E731

    def log_problem(f: F64) -> tuple[F64, F64]:
        level = np.where(f > 0, 0.0, 2 * np.log(2.0)) - 2 * np.log1p(-f)
        return -2 * np.log1p(-f) / f, np.abs(f) / (2 * np.sqrt(level))

    f = span(k)
    target, weight = log_problem(f)
    coefs = round_coefs(f, target, weight, 7, {0: 2.0})
    g = f32(span(dense))
    g_target, g_weight = log_problem(g)
    log_error = lambda c: float(np.max(g_weight * np.abs(horner(c, g) - g_target)))  # noqa: E731
    show("log: Q", *polish(coefs, log_error, list(range(1, 7))))

    # sin(pi/2 y) = y * S(y^2), cos(pi/2 y) = 1 + y^2 * C(y^2), y in [-1, 1].
    t = (k + 1) / 2
    y = np.sqrt(t)
    v = f32(dense)
    s = f32(v * v)
    coefs = round_coefs(t, np.sin(np.pi / 2 * y) / y, y, 5, {})
    sin_error = lambda c: float(np.max(np.abs(f32(v * horner(c, s)) - np.sin(np.pi / 2 * v))))  # noqa: E731
    show("sin: S", *polish(coefs, sin_error, list(range(5))))
    coefs = round_coefs(t, np.cos(np.pi / 2 * y), np.ones_like(t), 5, {0: 1.0})
    cos_error = lambda c: float(np.max(np.abs(horner(c, s) - np.cos(np.pi / 2 * v))))  # noqa: E731
    show("cos: 1, C", *polish(coefs, cos_error, list(range(1, 5))))


if __name__ == "__main__":
    main()
