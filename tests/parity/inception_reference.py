"""The FID Inception-v3 in torch, written from its published structure, with the published names."""

import torch
import torch.nn.functional as F
from torch import nn


class Conv(nn.Module):
    def __init__(self, i, o, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def mean3(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max3(x):
    return F.max_pool2d(x, 3, 1, 1)


class A(nn.Module):
    def __init__(self, i, pool, w):
        super().__init__()
        self.branch1x1 = Conv(i, w(64), 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(i, w(48), 1), Conv(w(48), w(64), 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(i, w(64), 1), Conv(w(64), w(96), 3, padding=1)
        self.branch3x3dbl_3 = Conv(w(96), w(96), 3, padding=1)
        self.branch_pool = Conv(i, pool, 1)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(mean3(x))], 1)


class B(nn.Module):
    def __init__(self, i, w):
        super().__init__()
        self.branch3x3 = Conv(i, w(384), 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(i, w(64), 1), Conv(w(64), w(96), 3, padding=1)
        self.branch3x3dbl_3 = Conv(w(96), w(96), 3, 2)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class C(nn.Module):
    def __init__(self, i, n, w):
        super().__init__()
        across, down = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(i, w(192), 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(i, n, 1), Conv(n, n, **across)
        self.branch7x7_3 = Conv(n, w(192), **down)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(i, n, 1), Conv(n, n, **down)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(n, n, **across), Conv(n, n, **down)
        self.branch7x7dbl_5 = Conv(n, w(192), **across)
        self.branch_pool = Conv(i, w(192), 1)

    def forward(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = x
        for k in range(1, 6):
            double = getattr(self, f"branch7x7dbl_{k}")(double)
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(mean3(x))], 1)


class D(nn.Module):
    def __init__(self, i, w):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(i, w(192), 1), Conv(w(192), w(320), 3, 2)
        self.branch7x7x3_1 = Conv(i, w(192), 1)
        self.branch7x7x3_2 = Conv(w(192), w(192), (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(w(192), w(192), (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(w(192), w(192), 3, 2)

    def forward(self, x):
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class E(nn.Module):
    def __init__(self, i, pool, w):
        super().__init__()
        left, up = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.pool = pool
        self.branch1x1, self.branch3x3_1 = Conv(i, w(320), 1), Conv(i, w(384), 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(w(384), w(384), **left), Conv(w(384), w(384), **up)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(i, w(448), 1), Conv(w(448), w(384), 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(w(384), w(384), **left), Conv(w(384), w(384), **up)
        self.branch_pool = Conv(i, w(192), 1)

    def forward(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    def __init__(self, width=1.0):
        super().__init__()
        w = lambda n: max(1, round(n * width))  # noqa: E731
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, w(32), 3, 2), Conv(w(32), w(32), 3)
        self.Conv2d_2b_3x3 = Conv(w(32), w(64), 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(w(64), w(80), 1), Conv(w(80), w(192), 3)
        a = 2 * w(64) + w(96)
        self.Mixed_5b, self.Mixed_5c = A(w(192), w(32), w), A(a + w(32), w(64), w)
        self.Mixed_5d = A(a + w(64), w(64), w)
        b = w(384) + w(96) + a + w(64)
        self.Mixed_6a = B(a + w(64), w)
        self.Mixed_6b, self.Mixed_6c = C(b, w(128), w), C(4 * w(192), w(160), w)
        self.Mixed_6d, self.Mixed_6e = C(4 * w(192), w(160), w), C(4 * w(192), w(192), w)
        self.Mixed_7a = D(4 * w(192), w)
        self.Mixed_7b = E(w(320) + 5 * w(192), mean3, w)
        self.Mixed_7c = E(w(320) + 4 * w(384) + w(192), max3, w)
        self.fc = nn.Linear(w(320) + 4 * w(384) + w(192), 1008)

    def forward(self, x):
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for block in "5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split():
            x = getattr(self, f"Mixed_{block}")(x)
        x = x.mean((2, 3))
        return x, x @ self.fc.weight.T


def make(width: float) -> Inception:
    """With random weights and statistics, none at its initial value."""
    torch.manual_seed(0)
    model = Inception(width).eval()
    with torch.no_grad():
        for name, array in [*model.named_parameters(), *model.named_buffers()]:
            if array.ndim > 1:
                array.normal_(0, (2 / array[0].numel()) ** 0.5)
            elif name.endswith(("bn.weight", "running_var")):
                array.uniform_(0.8, 1.2)
            elif array.ndim == 1:
                array.normal_(0, 0.1)
    return model
