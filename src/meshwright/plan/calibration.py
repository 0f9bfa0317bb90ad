"""From what `meshwright calibrate` measured to a cluster's rates: those with which the plan reckons the same seconds.

Each rate is the built-in one times what was predicted with it over what was measured, in the plan's own formulas.
"""

from math import prod

import msgspec

from meshwright.plan.calibration_links import fit_contention, fit_links
from meshwright.plan.compute import (
    CLIP_PASSES,
    UPDATE_PASSES,
    WHOLE_HEAD,
    attention_seconds,
    block_passes,
    elementwise_seconds,
    head_passes,
)
from meshwright.plan.fitting import DIGITS, Fit, fit_line, geometric_mean, rounded
from meshwright.plan.kept import BYTES
from meshwright.plan.machine import BANDWIDTH, processor_name
from meshwright.plan.part import STATE_BYTES, cut_model
from meshwright.record.calibration import Calibration
from meshwright.spec import (
    MESHWRIGHT,
    Cluster,
    DataSettings,
    Job,
    Layout,
    Measured,
    ModelSpec,
    Precision,
    RunSettings,
    Trainer,
)
from meshwright.spec.trainer import AttentionKernel

# Of a block's measured seconds, what its element-wise part takes at least, however fast products seemed alone.
LEAST_ELEMENTWISE = 0.02
# Of the fastest product's seconds, what it would take at least without edges.
LEAST_WHOLE = 0.5
# A backward pass of attention is never faster than this share of its forward pass: repeats that were disturbed.
LEAST_BACKWARD = 0.5


def calibrate_cluster(calibration: Calibration, cluster: Cluster, date: str) -> Cluster:
    """The cluster with the rates that were measured on it. date: YYYY-MM-DD."""
    fit = Fit(cluster=cluster, figures=calibration.figures, date=date)
    for step in (
        fit_memory,
        fit_products,
        fit_attention,
        fit_scores,
        fit_blocks,
        fit_loss,
        fit_passes,
        fit_host,
        fit_links,
        fit_contention,
    ):
        fit = step(fit)
    measured = Measured(
        date=date,
        device=calibration.device or processor_name(),
        processes=calibration.ranks,
        torch=calibration.torch,
        cuda=calibration.cuda,
        nccl=calibration.nccl,
        spread=fit.spread,
        misfit=fit.misfit,
    )
    return msgspec.structs.replace(fit.rounded().cluster, measured=measured)


def fit_memory(fit: Fit) -> Fit:
    """Plain copies: a CPU's bandwidth, and that of a GPU whose datasheet is not known."""
    copies = fit.of("copy")
    device, largest = fit.cluster.device, max(copies, key=lambda copy: copy.sizes)
    if device.kind != "cpu" and device.memory_bytes_per_s > 0:
        return fit.noting("memory", copies)
    device = msgspec.structs.replace(
        device,
        memory_bytes_per_s=rounded(2 * largest.sizes[0] / largest.seconds, DIGITS),
        source=f"{device.source.partition(BANDWIDTH)[0]}{BANDWIDTH}measured on {fit.date}",
    )
    return fit.noting("memory", copies).placed(device=device)


def fit_products(fit: Fit) -> Fit:
    """A share of the peak, and what short sides cost. Where no datasheet gives a peak, the fastest product is it."""
    products, device = fit.of("product"), fit.cluster.device
    flops = [2.0 * prod(product.sizes) for product in products]
    if device.peak_flops_per_s(precision_of(fit.cluster)) == 0:
        fastest = max(work / product.seconds for work, product in zip(flops, products, strict=True))
        source = f"{device.source}; peaks: the fastest products measured on {fit.date}"
        device = msgspec.structs.replace(device, peak_bf16_flops_per_s=rounded(fastest, DIGITS), source=source)
        if plain := fit.of("product.fp32"):
            slowest = 2.0 * prod(plain[0].sizes) / plain[0].seconds
            device = msgspec.structs.replace(device, peak_fp32_flops_per_s=rounded(slowest, DIGITS))
        fit = fit.placed(device=device)
    peak = device.peak_flops_per_s(precision_of(fit.cluster))
    edges = [sum(1 / side for side in product.sizes) for product in products]
    slowdowns = [product.seconds * peak / work for product, work in zip(products, flops, strict=True)]
    whole, edge = fit_line(edges, slowdowns)
    if whole < LEAST_WHOLE * min(slowdowns):
        # No product is mostly edges: repeats were disturbed, or the sizes are too few to tell.
        edge = fit.rates.matmul_edge
        whole = geometric_mean([slowdown / (1 + edge * x) for x, slowdown in zip(edges, slowdowns, strict=True)])
        edge *= whole
    misfit = max(abs((whole + edge * x) / y - 1) for x, y in zip(edges, slowdowns, strict=True))
    return fit.with_rates("matmul", products, misfit, matmul=1 / whole, matmul_edge=edge / whole)


def fit_attention(fit: Fit) -> Fit:
    """Forward and backward, by kernel. What cannot be measured here is as much faster or slower as what was."""
    old = fit.rates.attention
    shares, misfit = measured_shares(fit, "attention")
    figures = fit.of("attention.forward") + fit.of("attention.both")
    if fit.cluster.device.kind == "cpu":
        return fit.with_rates("attention", figures, misfit, attention=dict.fromkeys(old, shares))
    flash = fit.of("attention.flash.forward")
    flash_shares = measured_shares(fit, "attention.flash")[0] if flash else scaled(old, "flash", shares, "cudnn")
    first = scaled(old, "flash-1", flash_shares, "flash")
    return fit.with_rates(
        "attention", figures, misfit, attention={**old, "cudnn": shares, "flash": flash_shares, "flash-1": first}
    )


def scaled(
    old: dict[AttentionKernel, tuple[float, float]],
    kernel: AttentionKernel,
    shares: tuple[float, float],
    beside: AttentionKernel,
) -> tuple[float, float]:
    """A kernel's built-in shares times what those of another one have become."""
    return (old[kernel][0] * shares[0] / old[beside][0], old[kernel][1] * shares[1] / old[beside][1])


def measured_shares(fit: Fit, name: str) -> tuple[tuple[float, float], float]:
    """Shares of the peak, forward and backward, and how far a size is from what they give."""
    old = fit.rates.attention["cudnn"]
    forward: list[float] = []
    backward: list[float] = []
    for one, both in zip(fit.of(f"{name}.forward"), fit.of(f"{name}.both"), strict=True):
        sequences, heads, sequence, head_dim = one.sizes
        model = model_of(heads * head_dim, heads, heads, head_dim)
        job = job_of(fit.cluster, model, sequences, sequence)
        predicted = attention_seconds(job, cut_model(job))
        forward.append(predicted[0] / one.seconds)
        backward.append(predicted[1] / max(both.seconds - one.seconds, LEAST_BACKWARD * one.seconds))
    means = geometric_mean(forward), geometric_mean(backward)
    misfit = max(
        abs(ratio / mean - 1) for ratios, mean in zip((forward, backward), means, strict=True) for ratio in ratios
    )
    return (old[0] * means[0], old[1] * means[1]), misfit


def fit_scores(fit: Fit) -> Fit:
    """Products of attention that has its scores in memory."""
    peak, figures = fit.cluster.device.peak_flops_per_s(precision_of(fit.cluster)), fit.of("scores")
    shares: list[float] = []
    for figure in figures:
        sequences, heads, sequence, head_dim = figure.sizes
        flops = 4.0 * sequences * heads * sequence**2 * head_dim
        shares.append(flops / (peak * min(1.0, head_dim / WHOLE_HEAD) * figure.seconds))
    return fit.with_mean("scores", figures, shares)


def fit_blocks(fit: Fit) -> Fit:
    """Element-wise work: what is left of a block's seconds when its products and its attention are taken off."""
    for rate, name, compiled in (("elementwise", "block.compiled", True), ("eager", "block.eager", False)):
        figures = fit.of(name)
        if not figures:
            continue
        trainer = msgspec.structs.replace(MESHWRIGHT, compiled=compiled)
        shares: list[float] = []
        for figure in figures:
            d_model, heads, kv_heads, head_dim, feed_forward, sequences, sequence = figure.sizes
            model = model_of(d_model, heads, kv_heads, head_dim, feed_forward=feed_forward)
            job = job_of(fit.cluster, model, sequences, sequence, trainer=trainer)
            cut = cut_model(job)
            passes, elementwise_s = block_passes(job, cut, cut.others), sum(elementwise_seconds(job, cut, dense=False))
            others_s = passes.forward_s + passes.backward_s - elementwise_s
            left_s = max(figure.seconds - others_s, LEAST_ELEMENTWISE * figure.seconds)
            shares.append(getattr(fit.rates, rate) * elementwise_s / left_s)
        fit = fit.with_mean(rate, figures, shares)
    return fit


def fit_loss(fit: Fit) -> Fit:
    """Cross entropy."""
    figures, shares = fit.of("loss"), list[float]()
    for figure in figures:
        tokens, vocabulary = figure.sizes
        model = model_of(64, 1, 1, 64, vocabulary=vocabulary)
        head = head_passes(job_of(fit.cluster, model, 1, tokens))
        loss_s = head.forward_s + head.backward_s - 3 * head.weights_s
        shares.append(fit.rates.loss * loss_s / figure.seconds)
    return fit.with_mean("loss", figures, shares)


def fit_passes(fit: Fit) -> Fit:
    """The optimizer's passes and FSDP's copies: bytes over a share of the bandwidth."""
    size = BYTES[precision_of(fit.cluster)]
    bytes_each = {
        "update": UPDATE_PASSES * STATE_BYTES,
        "clip": CLIP_PASSES * STATE_BYTES,
        "copy_in": size + STATE_BYTES,
        "copy_out": 2 * size,
    }
    for name, each in bytes_each.items():
        figures = fit.of(name)
        moved = (each * figure.sizes[0] / figure.seconds for figure in figures)
        fit = fit.with_mean(name, figures, [rate / fit.cluster.device.memory_bytes_per_s for rate in moved])
    return fit


def fit_host(fit: Fit) -> Fit:
    """Launches, and what goes to the host and is done there."""
    eager, sharded = fit.of("host.eager"), fit.of("host.sharded")
    plain = fit.of("host.compiled") or eager
    layers = plain[0].sizes[0]
    # FSDP's groups: each block, the head with its norm, and the root.
    group_s = max(0.0, sharded[0].seconds - plain[0].seconds) / (layers + 2)
    fit = fit.with_rates("eager_host_s", eager, None, eager_host_s=eager[0].seconds / layers)
    fit = fit.with_rates("block_host_s", plain, None, block_host_s=plain[0].seconds / layers)
    fit = fit.with_rates("group_host_s", sharded, None, group_host_s=group_s)
    ways = fit.of("to_device") + fit.of("to_host")
    if ways:
        largest = [way for way in ways if way.sizes == max(one.sizes for one in ways)]
        link = min(way.sizes[0] / way.seconds for way in largest)
        fit = fit.with_rates("host_link_bytes_per_s", ways, None, host_link_bytes_per_s=link)
    if updates := fit.of("host_update"):
        moved = (UPDATE_PASSES + CLIP_PASSES) * STATE_BYTES * updates[0].sizes[0] / updates[0].seconds
        fit = fit.with_rates("host_update_bytes_per_s", updates, None, host_update_bytes_per_s=moved)
    return fit


def precision_of(cluster: Cluster) -> Precision:
    """What a calibration's products are computed in."""
    return "fp32" if cluster.device.kind == "cpu" else "bf16"


def model_of(
    d_model: int, heads: int, kv_heads: int, head_dim: int, *, feed_forward: int = 1, vocabulary: int = 2
) -> ModelSpec:
    """A model of one block."""
    return ModelSpec(
        layers=1,
        d_model=d_model,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward=feed_forward,
        vocabulary=vocabulary,
    )


def job_of(cluster: Cluster, model: ModelSpec, sequences: int, sequence: int, *, trainer: Trainer = MESHWRIGHT) -> Job:
    """A job of one microbatch on one device."""
    return Job(
        run=RunSettings(name="calibration", steps=1),
        model=model,
        data=DataSettings(sequence=sequence, global_batch=sequences),
        layout=Layout(microbatch=sequences, precision=precision_of(cluster)),
        cluster=msgspec.structs.replace(cluster, nodes=1, devices_per_node=1),
        trainer=trainer,
    )
