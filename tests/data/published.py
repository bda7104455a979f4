"""Numbers that others have published. This file holds data only.

``STATA``: standard errors by Stata 11, as printed in statsmodels' own tests
(statsmodels/discrete/tests/results/results_discrete.py), the constant last.

``LONGLEY_*`` and ``NONLINEAR``: certified values and data of NIST's Statistical Reference
Datasets, which are in the public domain. https://www.itl.nist.gov/div898/strd/lls/data/
Longley.shtml, the constant moved last; https://www.itl.nist.gov/div898/strd/nls/data/
misra1a.shtml, ratkowsky3.shtml, mgh09.shtml, with the second starting point.
"""

from typing import NamedTuple

STATA = {
    "spector logit": [1.26294114526, 0.141554207662, 1.06456430165, 4.93132462871],
    "spector probit": [0.693882522754, 0.083890261293, 0.595037920474, 2.54247249731],
    "randhie poisson": [
        *(0.00288398915279, 0.01061725196728, 0.00182833684966, 0.00161284852954),
        *(0.01223913844387, 0.00056476496963, 0.00925061122826, 0.01530987068312),
        *(0.02627928267502, 0.01116266712362),
    ],
    "anes96 multinomial logit": [
        *(
            0.0342823657,
            0.093626795,
            0.0065248584,
            0.0735865799,
            0.0176336937,
            0.6298376313,
        ),
        *(
            0.0391615553,
            0.1082386919,
            0.0079144618,
            0.0852893563,
            0.0222809297,
            0.7631899491,
        ),
        *(
            0.0570382292,
            0.1585481337,
            0.0113313133,
            0.1262913234,
            0.0336142088,
            1.156541492,
        ),
        *(
            0.0437902764,
            0.1288965854,
            0.0084187486,
            0.0941250559,
            0.0261963632,
            0.9575809602,
        ),
        *(
            0.0393516553,
            0.1171860107,
            0.0076110152,
            0.0850070091,
            0.0229760791,
            0.8443638283,
        ),
        *(0.042138047, 0.1434089089, 0.0081338625, 0.0910979921, 0.025300888, 1.059954821),
    ],
}

LONGLEY_ESTIMATES = [
    *(15.0618722713733, -0.358191792925910e-01, -2.02022980381683, -1.03322686717359),
    *(-0.511041056535807e-01, 1829.15146461355, -3482258.63459582),
]
LONGLEY_DEVIATIONS = [
    *(84.9149257747669, 0.334910077722432e-01, 0.488399681651699, 0.214274163161675),
    *(0.226073200069370, 455.478499142212, 890420.383607373),
]
LONGLEY_RESIDUAL_DEVIATION = 304.854073561965


class Nonlinear(NamedTuple):
    """A nonlinear least squares problem with its certified answer."""

    x: list[float]
    y: list[float]
    start: list[float]
    estimates: list[float]
    deviations: list[float]
    residual_deviation: float


NONLINEAR = {
    "Misra1a": Nonlinear(
        x=[
            *(77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8),
            *(378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760.0),
        ],
        y=[
            *(10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02),
            *(44.82, 50.76, 55.05, 61.01, 66.40, 75.47, 81.78),
        ],
        start=[250, 0.0005],
        estimates=[2.3894212918e02, 5.5015643181e-04],
        deviations=[2.7070075241e00, 7.2668688436e-06],
        residual_deviation=1.0187876330e-01,
    ),
    "Rat43": Nonlinear(
        x=[float(i) for i in range(1, 16)],
        y=[
            *(16.08, 33.83, 65.80, 97.20, 191.55, 326.20, 386.87, 520.53),
            *(590.03, 651.92, 724.93, 699.56, 689.96, 637.56, 717.41),
        ],
        start=[700, 5, 0.75, 1.3],
        estimates=[6.9964151270e02, 5.2771253025e00, 7.5962938329e-01, 1.2792483859e00],
        deviations=[1.6302297817e01, 2.0828735829e00, 1.9566123451e-01, 6.8761936385e-01],
        residual_deviation=2.8262414662e01,
    ),
    "MGH09": Nonlinear(
        x=[4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625],
        y=[
            *(0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627),
            *(0.0456, 0.0342, 0.0323, 0.0235, 0.0246),
        ],
        start=[0.25, 0.39, 0.415, 0.39],
        estimates=[1.9280693458e-01, 1.9128232873e-01, 1.2305650693e-01, 1.3606233068e-01],
        deviations=[1.1435312227e-02, 1.9633220911e-01, 8.0842031232e-02, 9.0025542308e-02],
        residual_deviation=6.6279236551e-03,
    ),
}
