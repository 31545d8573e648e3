"""How sensitive is training to what the paper leaves unpublished: rho, tau and d. A run a value.

    python main.py --config=configs/sweep.py:rho=0.6,data=DATA --workdir=DIR
    python main.py --config=configs/sweep.py:d=2,data=DATA --workdir=DIR
    python main.py --config=configs/sweep.py:tau=60,data=DATA --workdir=DIR

    python -m data_prep build --mask percentile --tau 60 --output DATA-tau60 ...

rho is the least tissue share of all crops, d the slice offset. tau, the percentile of the tissue
threshold, belongs to preprocessing: one data set a value, beside DATA. base=nano, vits14 (default),
vitb14_518 or vitl14; several options may be given at once.
"""

from configs import options


def get_config(arg=None):
    _, o = options.parse(arg, rho="", d="", tau="", base="vits14", data="", photometrics="mammo")
    if not (o["rho"] or o["d"] or o["tau"]):
        raise ValueError("a sweep needs one of rho=SHARE, d=SLICES or tau=PERCENTILE")
    if o["tau"] and not o["data"]:
        raise ValueError("tau needs data=DATA: the run reads DATA-tau<value>")
    c = options.base_recipe(o["base"], o["data"] + (f"-tau{o['tau']}" if o["tau"] else ""))
    c.augment.update(options.photometrics(o["photometrics"]))
    if o["rho"]:
        c.crops.update(global_coverage=float(o["rho"]), local_coverage=float(o["rho"]))
    if o["d"]:
        c.pairs.offsets = (int(o["d"]),)
    return c
