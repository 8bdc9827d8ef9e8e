"""Tile-aligned components near a given weight: a greedy choice under the layer's metric, then least squares.

A group of components is L R^T on a rectangle I x J of the weight, of rank ``group``.  With E what is left of the weight
and Q = G E A, adding X = L R^T to the structured weight lowers f = tr(G E A E^T) by

    2 <Q_IJ, X> - <G_II X A_JJ, X>,

most for X = P^-T Y S^-1 with G_II = P P^T, A_JJ = S S^T and Y the best approximation of that rank to P^-1 Q_IJ S^-T
(Eckart and Young), by the sum of its squared singular values.  Subspace iteration finds Y: with V given, U spans
(P^-1 Q_IJ S^-T) V and V becomes its image of U, two least-squares problems, so that f never rises, whatever V it starts
from.

1. Rectangles of tiles, of half, once and twice the mean length that the tile counts allow, wait in a heap by their
   decrease of f per parameter.  The best is taken and Q updated, until all groups are taken.  A decrease is looked at
   again only when it is at the top (lazy greedy; with what is taken, decreases mostly fall).
2. Tiles still to be had prolong intervals where the gradient with respect to a neighbouring tile is largest.
3. Each group in turn is fitted again, a few times.

Under statistics the plain choice is made, too, and what is better under them is returned.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from structfly.patterns.nearest import nearest
from structfly.patterns.whitening import has_metric, in_metric, with_ridge
from structfly.records.layer import NO_STATISTICS, LayerSizes, LayerStatistics

Interval = tuple[int, int]  # tiles, the last excluded


class Shape(NamedTuple):
    """What a projection may use: see :class:`structfly.patterns.gblr.GBLR`."""

    tile: int
    group: int
    groups: int
    left_tiles: int
    right_tiles: int


class Component(NamedTuple):
    """``left`` (rows, group) ``right``^T (columns, group) on two intervals of tiles."""

    rows: Interval
    columns: Interval
    left: Tensor
    right: Tensor


class Projection:
    """Of one weight, for any shape; what shapes of the same tile have in common is made once.

    Args:
        weight: (out, in).
        statistics: of its layer.
    """

    def __init__(self, weight: Tensor, statistics: LayerStatistics) -> None:
        self.weight, self.statistics = weight, statistics
        self._plain = _Metrics(weight, NO_STATISTICS)
        self._informed = _Metrics(weight, statistics) if has_metric(statistics) else None

    def __call__(self, shape: Shape, sweeps: int) -> list[Component]:
        """``shape.groups`` components with ``shape.left_tiles`` and ``shape.right_tiles`` tiles in all."""
        plain = _Greedy(self.weight, self._plain, shape).run(sweeps)
        if self._informed is None:
            return plain
        informed = _Greedy(self.weight, self._informed, shape).run(sweeps)
        sides = LayerSizes(self.weight.shape[1], self.weight.shape[0])

        def dense(components: list[Component]) -> Tensor:
            made = torch.zeros_like(self.weight)
            for each in components:
                rows = _features(each.rows, shape.tile, sides.out_features)
                made[rows, _features(each.columns, shape.tile, sides.in_features)] += each.left @ each.right.t()
            return made

        return nearest(self.weight, self.statistics, dense, plain, informed)


def _features(interval: Interval, tile: int, features: int) -> slice:
    return slice(interval[0] * tile, min(interval[1] * tile, features))


class _Metric:
    """M of the rows or of the columns, None for the identity, and Cholesky factors of its diagonal blocks."""

    def __init__(self, matrix: Tensor | None) -> None:
        self.matrix = matrix
        self._factors: dict[tuple[int, int], Tensor] = {}

    def factor(self, part: slice) -> Tensor | None:
        """P with P P^T = M[part, part], made when it is first asked for."""
        key = part.start, part.stop
        if self.matrix is not None and key not in self._factors:
            self._factors[key] = torch.linalg.cholesky(self.matrix[part, part])
        return self._factors.get(key)


class _Metrics:
    """Both metrics of a layer, and G W A."""

    def __init__(self, weight: Tensor, statistics: LayerStatistics) -> None:
        outer, inner = with_ridge(statistics.output_fisher, weight), with_ridge(statistics.input_covariance, weight)
        self.rows, self.columns = _Metric(outer), _Metric(inner)
        self.gradient = in_metric(weight, outer, inner)


class _Side:
    """Rows or columns in tiles, and how many tiles groups may still have."""

    def __init__(self, metric: _Metric, features: int, tile: int, tiles: int) -> None:
        self.metric, self.features, self.tile, self.left_over = metric, features, tile, tiles
        self.places = -(-features // tile)

    def slice_of(self, interval: Interval) -> slice:
        return _features(interval, self.tile, self.features)

    def whitened(self, interval: Interval, rows: Tensor, transposed: bool = False) -> Tensor:
        """P^-1 rows, or P^-T rows, with P P^T the metric of the interval."""
        factor = self.metric.factor(self.slice_of(interval))
        if factor is None:
            return rows
        solved: Tensor = torch.linalg.solve_triangular(factor.t() if transposed else factor, rows, upper=transposed)
        return solved

    def coloured(self, interval: Interval, rows: Tensor) -> Tensor:
        """P^T rows."""
        factor = self.metric.factor(self.slice_of(interval))
        return rows if factor is None else factor.t() @ rows

    def seen(self, interval: Interval, rows: Tensor) -> Tensor:
        """M[:, interval] rows, for all features."""
        part = self.slice_of(interval)
        if self.metric.matrix is not None:
            return self.metric.matrix[:, part] @ rows
        return F.pad(rows, (0, 0, part.start, self.features - part.stop))

    def intervals(self, tiles: float) -> list[Interval]:
        """All of about so many tiles, side by side; the last may overlap the one before."""
        length = min(max(round(tiles), 1), self.places)
        starts = {*range(0, self.places - length + 1, length), self.places - length}
        return [(start, start + length) for start in sorted(starts)]

    def cut(self, interval: Interval, groups_left: int) -> Interval:
        """The interval, or its beginning where a tile for each of the other groups would not be left."""
        return interval[0], min(interval[1], interval[0] + self.left_over - groups_left + 1)


class _Greedy:
    def __init__(self, weight: Tensor, metrics: _Metrics, shape: Shape) -> None:
        self.shape = shape
        self.rows = _Side(metrics.rows, weight.shape[0], shape.tile, shape.left_tiles)
        self.columns = _Side(metrics.columns, weight.shape[1], shape.tile, shape.right_tiles)
        self.gradient = metrics.gradient.clone()
        self.generator = torch.Generator().manual_seed(0)

    def run(self, sweeps: int) -> list[Component]:
        components = self._choose()
        rows = self._prolonged([c.rows for c in components], self.rows, self._scores(components, of_rows=True))
        columns = self._prolonged([c.columns for c in components], self.columns, self._scores(components, False))
        for sweep in range(sweeps):
            for number, old in enumerate(components):
                self._update(old, sign=1)
                start = old.right
                if sweep == 0:
                    part, whole = self.columns.slice_of(old.columns), self.columns.slice_of(columns[number])
                    start = F.pad(old.right, (0, 0, part.start - whole.start, whole.stop - part.stop))
                components[number] = self._fit(rows[number], columns[number], start)
                self._update(components[number], sign=-1)
        return [_balanced(each) for each in components]

    def _choose(self) -> list[Component]:
        shape, chosen = self.shape, list[Component]()
        mean_rows, mean_columns = shape.left_tiles / shape.groups, shape.right_tiles / shape.groups
        rectangles = {
            (rows, columns)
            for share in (0.5, 1, 2)
            for rows in self.rows.intervals(share * mean_rows)
            for columns in self.columns.intervals(share * mean_columns)
        }
        heap = [self._entry(rows, columns, 0) for rows, columns in sorted(rectangles)]
        heapq.heapify(heap)
        while len(chosen) < shape.groups:
            _, rows, columns, seen = heap[0]
            missing = shape.groups - len(chosen)
            short = self.rows.cut(rows, missing), self.columns.cut(columns, missing)
            if seen < len(chosen) or short != (rows, columns):
                heapq.heapreplace(heap, self._entry(*short, len(chosen)))
                continue
            chosen.append(self._fit(rows, columns, self._random(columns), iterations=2))
            self._update(chosen[-1], sign=-1)
            self.rows.left_over -= rows[1] - rows[0]
            self.columns.left_over -= columns[1] - columns[0]
        return chosen

    def _entry(self, rows: Interval, columns: Interval, taken: int) -> tuple[float, Interval, Interval, int]:
        """Minus the decrease of f per tile, and how many groups had been taken."""
        found = self._fit(rows, columns, self._random(columns))
        part = self.gradient[self.rows.slice_of(rows), self.columns.slice_of(columns)]
        decrease = float((part * (found.left @ found.right.t())).sum())  # <Q, X> = <G X A, X> at a minimum
        return -decrease / (rows[1] - rows[0] + columns[1] - columns[0]), rows, columns, taken

    def _random(self, columns: Interval) -> Tensor:
        part = self.columns.slice_of(columns)
        drawn = torch.randn(part.stop - part.start, self.shape.group, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.gradient)

    def _fit(self, rows: Interval, columns: Interval, right: Tensor, iterations: int = 1) -> Component:
        part = self.gradient[self.rows.slice_of(rows), self.columns.slice_of(columns)]
        v = self.columns.coloured(columns, right)
        for _ in range(iterations):
            v = _orthonormal(v)
            image = self.rows.whitened(rows, part @ self.columns.whitened(columns, v, transposed=True))
            u = self.rows.whitened(rows, _orthonormal(image), transposed=True)
            v = self.columns.whitened(columns, part.t() @ u)
        return Component(rows, columns, u, self.columns.whitened(columns, v, transposed=True))

    def _update(self, component: Component, sign: int) -> None:
        """Put the component back into what is left, or take it away: Q += sign G X A."""
        left, right = (
            self.rows.seen(component.rows, component.left),
            self.columns.seen(component.columns, component.right),
        )
        self.gradient.addmm_(left, right.t(), alpha=sign)

    def _scores(self, components: list[Component], of_rows: bool) -> Tensor:
        """(groups, tiles): about how much f falls if a group's interval gets a tile more."""
        side, gradient = (self.rows, self.gradient) if of_rows else (self.columns, self.gradient.t())
        metric = side.metric.matrix
        weights = gradient.new_ones(side.features) if metric is None else metric.diagonal()
        scores = []
        for each in components:
            if of_rows:
                image = gradient[:, self.columns.slice_of(each.columns)] @ _orthonormal(each.right)
            else:
                image = gradient[:, self.rows.slice_of(each.rows)] @ _orthonormal(each.left)
            energies = image.square().sum(1) / weights
            padded = F.pad(energies, (0, side.places * side.tile - side.features))
            scores.append(padded.view(side.places, side.tile).sum(1))
        return torch.stack(scores)

    def _prolonged(self, intervals: list[Interval], side: _Side, scores: Tensor) -> list[Interval]:
        values = scores.tolist()
        heap: list[tuple[float, int, int]] = []

        def offer(number: int) -> None:
            start, stop = intervals[number]
            for place in (start - 1, stop):
                if 0 <= place < side.places:
                    heapq.heappush(heap, (-values[number][place], number, place))

        for number in range(len(intervals)):
            offer(number)
        while side.left_over:
            _, number, place = heapq.heappop(heap)
            start, stop = intervals[number]
            if start <= place < stop:
                continue
            intervals[number] = min(start, place), max(stop, place + 1)
            side.left_over -= 1
            offer(number)
        return intervals


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis that spans them, with zeros where it has fewer vectors than there are columns."""
    basis: Tensor = torch.linalg.qr(columns).Q
    return F.pad(basis, (0, columns.shape[1] - basis.shape[1]))


def _balanced(component: Component) -> Component:
    """Both sides of the same norm."""
    left, right = component.left.norm(), component.right.norm()
    if not (left > 0 and right > 0):
        return component
    scale = (right / left).sqrt()
    return component._replace(left=component.left * scale, right=component.right / scale)
