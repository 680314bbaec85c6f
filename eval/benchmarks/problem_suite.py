"""Fixed-point problems that solvers are compared on, in four families; each is built from its seed alone.

- `classical`: nonlinear systems F(z) = 0 of the literature, as z = f(z). Numbers (MGH 26 and so on) are those of Moré,
  Garbow, Hillstrom 1981. Systems have their variables in the last axis and one position, so that both scopes agree; those
  called "causal" have one variable a position, and only the couplings to earlier ones.
- `random`: affine and tanh maps whose Jacobian at the solution has a given spectral radius and departure from normality.
- `cells`: Transformer-XL cells with random weights, from contractive to chaotic ones.
- `trained`: the cell of a trained model on its own text, in float32.

Not among the classical ones are Powell's singular function (MGH 13), whose squares have no sign, so that z - alpha F(z)
attracts from one side only, and Powell's badly scaled one (MGH 3), where no single alpha serves both equations.

References:
    Moré, Garbow, Hillstrom 1981, "Testing unconstrained optimization software", ACM TOMS 7(1).
    Kelley 1995, "Iterative methods for linear and nonlinear equations", section 5.6 (the H-equation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from deq_lm.cells.memory import Memory
from deq_lm.cells.transformer_xl import TransformerXLCell, TransformerXLConfig

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Find z with f(z) = z.

    Attributes:
        name: unique in a suite.
        family: "classical", "random", "cells" or "trained".
        f: the map; no sequence influences another.
        z0: the start, (B, L, D).
        causal: whether position t of f(z) depends on positions <= t of z alone, which the prefix scope needs.
        z_star: a solution, (B, L, D), where it is known.
        picard: whether plain iteration is expected to converge to it; None where nobody knows.
        notes: source, and the form it is solved in.
    """

    name: str
    family: str
    f: Map
    z0: Tensor
    causal: bool = True
    z_star: Tensor | None = None
    picard: bool | None = None
    notes: str

    def __repr__(self) -> str:
        return self.name


# --- classical ---------------------------------------------------------------------------------------------------------


def classical_problems(seed: int = 0, num_starts: int = 4) -> list[Problem]:
    """Started from the published point and from others near it."""
    generator = torch.Generator().manual_seed(seed)

    def problem(name: str, f: Map, start: Tensor, **facts: object) -> Problem:
        noise = torch.randn(num_starts, *start.shape, dtype=torch.float64, generator=generator)
        noise[0] = 0.0
        z_star = facts.pop("z_star", None)
        if isinstance(z_star, Tensor):
            facts["z_star"] = z_star.expand(num_starts, *start.shape)
        return Problem(name=name, family="classical", f=f, z0=start + 0.1 * noise, **facts)  # pyright: ignore[reportArgumentType]

    size = 10
    ones = torch.ones(1, size, dtype=torch.float64)  # one position
    causal_ones = torch.ones(32, 1, dtype=torch.float64)  # one variable a position
    grid = torch.arange(1, size + 1, dtype=torch.float64) / (size + 1)
    rosenbrock_start = torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat(size // 2)[None]
    return [
        problem(
            "discrete boundary value",
            _boundary_value,
            (grid * (grid - 1))[None],
            picard=True,
            notes="MGH 28, z - F(z) / 2 (Jacobi's iteration): converges like cos(pi h), slowly.",
        ),
        problem(
            "discrete integral equation",
            _integral_equation,
            (grid * (grid - 1))[None],
            picard=True,
            notes="MGH 29, solved for the variable: a strong contraction.",
        ),
        problem(
            "Broyden tridiagonal",
            lambda z: z - 0.2 * ((3 - 2 * z) * z - _shifted(z, 1) - 2 * _shifted(z, -1) + 1),
            -ones,
            picard=True,
            notes="MGH 30, z - 0.2 F(z).",
        ),
        problem(
            "Broyden banded",
            lambda z: z - 0.15 * (z * (2 + 5 * z**2) + 1 - _banded(z, 1)),
            -ones,
            picard=True,
            notes="MGH 31, z - 0.15 F(z): the start lies outside the region where it contracts.",
        ),
        problem(
            "trigonometric",
            _trigonometric,
            1 + ones / size,
            picard=True,
            z_star=ones,
            notes="MGH 26, z + F(z - 1): its Jacobian vanishes at the solution, which is moved from 0 to 1.",
        ),
        problem(
            "Brown almost-linear",
            _brown_almost_linear,
            0.5 * ones,
            picard=True,
            notes="MGH 27, z - F(z) / (n + 1): slowest rate n / (n + 1). It has several solutions.",
        ),
        problem(
            "extended Rosenbrock",
            _extended_rosenbrock,
            rosenbrock_start,
            picard=True,
            z_star=ones,
            notes="MGH 21, pairs (z1 + 0.1 (1 - z1), z1^2): triangular, and far from normal along the valley.",
        ),
        *(
            problem(
                f"H-equation c={c}",
                _h_equation(c, 64),
                torch.ones(1, 64, dtype=torch.float64),
                picard=True,
                notes="Chandrasekhar 1960, midpoint rule. The Jacobian's radius is 1 - sqrt(1 - c).",
            )
            for c in (0.5, 0.9, 0.9999)
        ),
        problem(
            "causal integral equation",
            _volterra,
            -0.1 * causal_ones,
            picard=True,
            notes="The Volterra half of MGH 29.",
        ),
        problem(
            "causal Broyden tridiagonal",
            lambda z: z - 0.2 * ((3 - 2 * z) * z - _shifted(z, 1, axis=1) + 1),
            -causal_ones,
            picard=True,
            notes="MGH 30 without the coupling to the next variable, z - 0.2 F(z).",
        ),
        problem(
            "causal Broyden banded",
            lambda z: z - 0.15 * (z * (2 + 5 * z**2) + 1 - _banded(z, 0, axis=1)),
            -causal_ones,
            picard=True,
            notes="MGH 31 without the coupling to the next variable, z - 0.15 F(z).",
        ),
        problem(
            "causal Rosenbrock chain",
            _rosenbrock_chain,
            torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat(4)[:, None],
            picard=True,
            z_star=torch.ones(8, 1, dtype=torch.float64),
            notes="z_t = (z_t + z_{t-1}^2) / 2, a chain of MGH 21: all eigenvalues are 1/2, and an error of one position "
            "is twice as large at the next.",
        ),
    ]


def _shifted(z: Tensor, by: int, axis: int = -1) -> Tensor:
    """z_{i - by}, and 0 beyond the ends."""
    rolled = z.roll(by, dims=axis)
    edge = rolled.narrow(axis, 0 if by > 0 else z.shape[axis] + by, abs(by))
    edge.zero_()
    return rolled


def _boundary_value(z: Tensor) -> Tensor:
    size = z.shape[-1]
    step = 1 / (size + 1)
    grid = torch.arange(1, size + 1, dtype=z.dtype) * step
    return (_shifted(z, 1) + _shifted(z, -1) - step**2 * (z + grid + 1) ** 3 / 2) / 2


def _integral_equation(z: Tensor) -> Tensor:
    size = z.shape[-1]
    step = 1 / (size + 1)
    grid = torch.arange(1, size + 1, dtype=z.dtype) * step
    cubes = (z + grid + 1) ** 3
    before = (grid * cubes).cumsum(dim=-1)
    after = ((1 - grid) * cubes).flip(-1).cumsum(dim=-1).flip(-1) - (1 - grid) * cubes
    return -step / 2 * ((1 - grid) * before + grid * after)


def _volterra(z: Tensor) -> Tensor:
    step = 1 / (z.shape[1] + 1)
    grid = torch.arange(1, z.shape[1] + 1, dtype=z.dtype)[:, None] * step
    return -step / 2 * (1 - grid) * (grid * (z + grid + 1) ** 3).cumsum(dim=1)


def _banded(z: Tensor, num_after: int, axis: int = -1) -> Tensor:
    """The sum of z_j (1 + z_j) over five variables before and `num_after` behind."""
    terms = z * (1 + z)
    shifts = [*range(1, 6), *range(-num_after, 0)]
    return torch.stack([_shifted(terms, shift, axis) for shift in shifts]).sum(dim=0)


def _trigonometric(z: Tensor) -> Tensor:
    x = z - 1
    size = z.shape[-1]
    index = torch.arange(1, size + 1, dtype=z.dtype)
    return z + size - x.cos().sum(dim=-1, keepdim=True) + index * (1 - x.cos()) - x.sin()


def _brown_almost_linear(z: Tensor) -> Tensor:
    size = z.shape[-1]
    system = z + z.sum(dim=-1, keepdim=True) - (size + 1)
    last = z.prod(dim=-1, keepdim=True) - 1
    return z - torch.cat([system[..., :-1], last], dim=-1) / (size + 1)


def _extended_rosenbrock(z: Tensor) -> Tensor:
    first, _ = z.unflatten(-1, (-1, 2)).unbind(dim=-1)
    return torch.stack([first + 0.1 * (1 - first), first**2], dim=-1).flatten(-2)


def _rosenbrock_chain(z: Tensor) -> Tensor:
    return (z + torch.cat([torch.ones_like(z[:, :1]), z[:, :-1] ** 2], dim=1)) / 2


def _h_equation(c: float, size: int) -> Map:
    nodes = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    kernel = c / (2 * size) * nodes[:, None] / (nodes[:, None] + nodes)
    return lambda z: 1 / (1 - z @ kernel.T)


# --- random maps -------------------------------------------------------------------------------------------------------


def random_problems(
    radii: tuple[float, ...] = (0.5, 0.9, 0.99, 1.1),
    departures: tuple[float, ...] = (0.0, 1.0, 2.0),
    *,
    batch: int = 4,
    length: int = 16,
    width: int = 16,
    seed: int = 0,
) -> list[Problem]:
    """Affine and tanh maps over all radii and departures from normality.

    The Jacobian at the solution is block lower triangular over positions, so that its eigenvalues are those of its diagonal
    blocks. These are Q (D + N) Q^T: D has the eigenvalues, complex pairs among them, N is strictly upper triangular of
    norm about `departure`. A radius of 1 or more has its eigenvalues in the left half plane, away from 1, where z - f(z)
    stays well conditioned and only plain iteration fails.
    """
    problems = []
    for index, (radius, departure) in enumerate((r, n) for r in radii for n in departures):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        shape = (batch, length, width)
        jacobian = _causal_jacobian(shape, radius, departure, generator)
        z_star = torch.randn(shape, dtype=torch.float64, generator=generator)
        facts = {
            "family": "random",
            "z0": torch.zeros_like(z_star),
            "picard": radius < 1,
            "notes": f"radius {radius}, departure from normality {departure}",
        }
        label = f"radius={radius} departure={departure:g}"
        problems.append(Problem(name=f"affine {label}", f=_affine(jacobian, z_star), z_star=z_star, **facts))
        z_star = 1.2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 0.6
        problems.append(Problem(name=f"tanh {label}", f=_tanh(jacobian, z_star), z_star=z_star, **facts))
    return problems


def _causal_jacobian(
    shape: tuple[int, int, int], radius: float, departure: float, generator: torch.Generator
) -> Tensor:
    """(B, L D, L D), block lower triangular."""
    batch, length, width = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64, generator=generator)

    matrix = normal(batch, length, width, length, width) / math.sqrt(length * width)
    matrix *= torch.ones(length, length, dtype=torch.float64).tril(-1)[None, :, None, :, None]
    pairs = width // 2
    modulus = radius * torch.rand(batch, length, pairs, dtype=torch.float64, generator=generator).sqrt()
    modulus[..., 0] = radius
    angle = math.pi * torch.rand(batch, length, pairs, dtype=torch.float64, generator=generator)
    if radius >= 1:
        angle = (angle + math.pi) / 2
    schur = normal(batch, length, width, width).triu(2) * (departure / math.sqrt(width))
    for pair in range(pairs):
        block = slice(2 * pair, 2 * pair + 2)
        cosine, sine = modulus[..., pair] * angle[..., pair].cos(), modulus[..., pair] * angle[..., pair].sin()
        schur[..., block, block] = torch.stack([cosine, -sine, sine, cosine], dim=-1).unflatten(-1, (2, 2))
    basis = torch.linalg.qr(normal(batch, length, width, width)).Q
    blocks = basis @ schur @ basis.mT
    for position in range(length):
        matrix[:, position, :, position] = blocks[:, position]
    return matrix.reshape(batch, length * width, length * width)


def _affine(jacobian: Tensor, z_star: Tensor) -> Map:
    offset = z_star - _apply(jacobian, z_star)
    return lambda z: _apply(jacobian, z) + offset


def _tanh(jacobian: Tensor, z_star: Tensor) -> Map:
    weight = jacobian / (1 - z_star.flatten(1)[..., None] ** 2)  # tanh'(x) = 1 - tanh(x)^2
    offset = z_star.atanh() - _apply(weight, z_star)
    return lambda z: (_apply(weight, z) + offset).tanh()


def _apply(matrix: Tensor, z: Tensor) -> Tensor:
    return (matrix @ z.flatten(1)[..., None]).view_as(z)


# --- cells -------------------------------------------------------------------------------------------------------------


def cell_problems(
    init_stds: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3),
    *,
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (64, 64)),
    input_scales: tuple[float, ...] = (1.0, 4.0),
    batch: int = 3,
    seed: int = 0,
) -> list[Problem]:
    """Transformer-XL cells with normal weights on normal inputs.

    The weaker the input against the cell's own weights, the harder: a small init_std makes f nearly the identity up to its
    normalization, a large one makes it chaotic.

    Args:
        init_stds: of the weights.
        sizes: (D, L).
        input_scales: standard deviation of x.
        batch: sequences of each.
        seed: of weights and inputs.
    """
    problems = []
    for (width, length), norm, scale, init_std in product(sizes, ("post", "pre"), input_scales, init_stds):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            config = TransformerXLConfig(
                d_model=width, num_heads=4, d_inner=4 * width, mem_len=0, norm=norm, init_std=init_std
            )
            cell = TransformerXLCell(config).double().requires_grad_(False).eval()
            x = scale * torch.randn(batch, length, width, dtype=torch.float64)
        problem = Problem(
            name=f"cell {norm} d={width} L={length} x={scale:g} std={init_std}",
            family="cells",
            f=cell.bind(x),
            z0=torch.zeros_like(x),
            notes="random weights and inputs",
        )
        problems.append(problem)
    return problems


def trained_problems(run: Path, *, batch: int = 8, num_segments: int = 2) -> Iterator[Problem]:
    """The cell of a saved model on the validation text of its run's recipe, memory carried from segment to segment.

    Args:
        run: a run folder, its final/ or one of its checkpoints/, with the recipe.yaml of the run there or above.
        batch: streams.
        num_segments: problems, one a segment.

    Raises:
        CheckpointError, ConfigError, DataError: no model, recipe or text.
    """
    from dataclasses import replace

    from deq_lm.data.encoding import PREPARED, prepare
    from deq_lm.data.streams import ContiguousStreams
    from deq_lm.equilibrium import Equilibrium
    from deq_lm.errors import CheckpointError
    from deq_lm.evaluation.loading import load_model, model_folder
    from deq_lm.training import load_recipe

    folder = model_folder(run)
    places = [place / "recipe.yaml" for place in (folder, *folder.resolve().parents[:2])]
    recipe_file = next((place for place in places if place.is_file()), None)
    if recipe_file is None:
        raise CheckpointError(
            f"{folder}: no recipe.yaml there or in the two folders above, to say on what text to solve."
        )
    model, _ = load_model(folder)
    recipe = load_recipe(recipe_file, [])
    data = recipe.data
    if data.corpus != PREPARED:
        data = replace(data, tokenizer=str(folder), vocab_size=None)
    tokens = prepare(data).splits["valid"].tokens
    length = recipe.evaluation.segment_length
    streams = ContiguousStreams(tokens, num_streams=batch, segment_length=length, drop_remainder=False)
    equilibrium = model.requires_grad_(False).model.layers
    assert isinstance(equilibrium, Equilibrium), f"{folder}: a model of depth {model.config.depth} solves nothing"
    given: list[tuple[Tensor, Memory | None]] = []
    equilibrium.register_forward_pre_hook(lambda _, arguments: given.append(arguments))
    memory = None
    for segment in range(num_segments):
        memory = model.model(streams.next_segment().input_ids, memory=memory).memory
        x, memory_before = given.pop()
        bound = equilibrium.cell.bind(x, memory_before)
        yield Problem(
            name=f"trained {run.name} segment {segment}",
            family="trained",
            f=bound,
            z0=torch.zeros_like(x),
            notes=f"{folder}, batch {batch}, length {length}, float32",
        )


def suite(*, seed: int = 0, quick: bool = False) -> list[Problem]:
    """All families that need no trained model; `quick` is a small problem or two of each."""
    if quick:
        return [
            *classical_problems(seed, num_starts=2)[::4],
            *random_problems((0.9,), (1.0,), batch=2, length=4, width=4, seed=seed),
            *cell_problems((0.1,), sizes=((16, 8),), batch=2, seed=seed),
        ]
    return [*classical_problems(seed), *random_problems(seed=seed), *cell_problems(seed=seed)]
