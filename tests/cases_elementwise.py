"""Cases of layers: normalisation, pooling, interpolation, losses, scattered additions, cells, device kernels."""

# Longer than 400 lines: one table of cases, with the models that its rows name.
from __future__ import annotations

import torch
from torch.nn import functional as F

from elementwise_tally import IMAGE, Case, X, meta, ones

aten = torch.ops.aten


def ctc_backward() -> object:
    log_probs, targets = ones(5, 2, 4), torch.ones(2, 3, dtype=torch.long)
    loss, alpha = aten._ctc_loss(log_probs, targets, [5, 4], [3, 2])
    return aten._ctc_loss_backward(loss, log_probs, targets, [5, 4], [3, 2], loss, alpha, 0)


LAYER_CASES = [
    # normalisation of 384 elements
    Case("native_layer_norm", lambda: F.layer_norm(IMAGE, (8, 8)), 1920, "5 x 384"),
    Case("native_layer_norm", lambda: F.layer_norm(IMAGE, (8,), ones(8), ones(8)), 2688, "5, weight, bias: 7 x 384"),
    Case("native_layer_norm", lambda: F.layer_norm(IMAGE, (8,), ones(8)), 2304, "5 and weight: 6 x 384"),
    Case("native_group_norm", lambda: F.group_norm(IMAGE, 3, ones(3), ones(3)), 2688, "7 x 384"),
    Case(
        "native_batch_norm",
        lambda: F.batch_norm(IMAGE, ones(3), ones(3), ones(3), ones(3), training=True),
        2688,
        "mean, difference, square, sum, scale, weight, bias: 7 x 384",
    ),
    Case(
        "native_batch_norm",
        lambda: F.batch_norm(IMAGE, ones(3), ones(3), ones(3), ones(3)),
        1536,
        "difference, scale, weight, bias: 4 x 384",
    ),
    Case("native_batch_norm", lambda: F.batch_norm(IMAGE, ones(3), ones(3)), 768, "difference, scale: 2 x 384"),
    Case(
        "_native_batch_norm_legit",
        lambda: aten._native_batch_norm_legit.no_stats(IMAGE, None, None, True, 0.1, 1e-5),
        1920,
        "no affine, no running statistics: 5 x 384",
    ),
    Case(
        "native_batch_norm_backward",
        lambda: aten.native_batch_norm_backward(
            IMAGE, IMAGE, ones(3), ones(3), ones(3), ones(3), ones(3), True, 1e-5, [True, True, True]
        ),
        4992,
        "xhat 2, dx 8, dw 2, db 1: 13 x 384",
    ),
    Case(
        "native_batch_norm_backward",
        lambda: aten.native_batch_norm_backward(
            IMAGE, IMAGE, ones(3), ones(3), ones(3), ones(3), ones(3), False, 1e-5, [True, False, False]
        ),
        384,
        "evaluation: the gradient times a constant",
    ),
    Case(
        "native_layer_norm_backward",
        lambda: aten.native_layer_norm_backward(
            IMAGE, IMAGE, [8], ones(2, 3, 8, 1), ones(2, 3, 8, 1), ones(8), ones(8), [True, True, True]
        ),
        4992,
        "13 x 384",
    ),
    Case(
        "native_layer_norm_backward",
        lambda: aten.native_layer_norm_backward(
            IMAGE, IMAGE, [8], ones(2, 3, 8, 1), ones(2, 3, 8, 1), ones(8), ones(8), [False, False, True]
        ),
        384,
        "only the bias: a sum",
    ),
    Case(
        "native_group_norm_backward",
        lambda: aten.native_group_norm_backward(
            IMAGE, IMAGE, ones(2, 3), ones(2, 3), ones(3), 2, 3, 64, 3, [True, False, False]
        ),
        3840,
        "xhat 2, dx 8: 10 x 384",
    ),
    Case("batch_norm_elemt", lambda: meta("batch_norm_elemt", (2, 3, 8, 8), (3,), (3,), (3,), (3,), 1e-5), 1536, "4 x"),
    # pooling
    Case("max_pool2d_with_indices", lambda: F.max_pool2d(IMAGE, 3), 216, "2 x 3 x 2 x 2 results of 9 taps"),
    Case("max_pool2d_with_indices", lambda: F.max_pool2d(IMAGE, 3, 2, 1), 864, "padding counts: 96 results of 9 taps"),
    Case("max_pool3d_with_indices", lambda: F.max_pool3d(IMAGE, 2), 256, "2 channels of 1 x 4 x 4 results, 8 taps"),
    Case("avg_pool2d", lambda: F.avg_pool2d(IMAGE, (2, 4)), 384, "48 results of 8 taps: each input once"),
    Case(
        "avg_pool2d_backward",
        lambda: aten.avg_pool2d_backward(ones(2, 3, 4, 4), IMAGE, [2, 2], [2, 2], [0, 0], False, True, None),
        480,
        "96 gradients: a division, 4 additions",
    ),
    Case("_adaptive_avg_pool2d", lambda: F.adaptive_avg_pool2d(IMAGE, 4), 384, "windows tile: each input once"),
    Case(
        "_adaptive_avg_pool2d", lambda: F.adaptive_avg_pool2d(IMAGE, (3, 8)), 480, "rows [0,3) [2,6) [5,8): 10 x 8 x 6"
    ),
    Case("mean", lambda: F.adaptive_avg_pool2d(IMAGE, 1), 384, "torch runs it as a mean: each input once"),
    Case("adaptive_max_pool2d", lambda: F.adaptive_max_pool2d(IMAGE, 4), 384, "each input once"),
    Case(
        "_adaptive_avg_pool2d_backward",
        lambda: aten._adaptive_avg_pool2d_backward(ones(2, 3, 4, 4), IMAGE),
        480,
        "96 divisions, 384 additions",
    ),
    Case(
        "max_pool2d_with_indices_backward",
        lambda: aten.max_pool2d_with_indices_backward(
            ones(2, 3, 4, 4), IMAGE, [2, 2], [2, 2], [0, 0], [1, 1], False, torch.zeros(2, 3, 4, 4, dtype=torch.long)
        ),
        96,
        "one addition a gradient",
    ),
    # interpolation: 2 x 3 x 16 x 16 = 1536 results
    Case("upsample_bilinear2d", lambda: F.interpolate(IMAGE, 16, mode="bilinear"), 13824, "3 linear ones of 3"),
    Case("upsample_bicubic2d", lambda: F.interpolate(IMAGE, 16, mode="bicubic"), 53760, "5 cubic ones of 7"),
    Case(
        "_upsample_bilinear2d_aa",
        lambda: F.interpolate(IMAGE, 4, mode="bilinear", antialias=True),
        2304,
        "8 -> 4: 4 taps at 2; 192 results along width, 96 along height",
    ),
    Case(
        "_upsample_bilinear2d_aa_backward",
        lambda: aten._upsample_bilinear2d_aa_backward(ones(2, 3, 4, 4), [4, 4], [2, 3, 8, 8], False),
        2304,
        "as its forward",
    ),
    Case(
        "grid_sampler_2d",
        lambda: F.grid_sample(IMAGE, ones(2, 4, 4, 2), align_corners=False),
        960,
        "96 results x 4 taps x 2, 64 coordinates x 3",
    ),
    Case(
        "grid_sampler_3d",
        lambda: F.grid_sample(ones(1, 2, 4, 4, 4), ones(1, 2, 2, 2, 3), align_corners=False),
        328,
        "16 results x 8 taps x 2, 24 coordinates x 3",
    ),
    Case(
        "grid_sampler_2d_backward",
        lambda: aten.grid_sampler_2d_backward(ones(2, 3, 4, 4), IMAGE, ones(2, 4, 4, 2), 0, 0, False, [True, True]),
        3264,
        "96 gradients x 4 taps x (2 + 3 x 2), 64 coordinates x 3",
    ),
    Case(
        "affine_grid_generator",
        lambda: F.affine_grid(ones(2, 2, 3), [2, 3, 4, 4], align_corners=False),
        384,
        "64 coordinates x 3 products and sums",
    ),
    # losses
    Case("mse_loss", lambda: F.mse_loss(X, X), 18, "difference, square, sum"),
    Case("mse_loss", lambda: F.mse_loss(X, X, reduction="none"), 12, "difference, square"),
    Case("smooth_l1_loss", lambda: F.smooth_l1_loss(X, X), 36, "6 x 6"),
    Case("huber_loss", lambda: F.huber_loss(X, X, reduction="sum"), 30, "5 x 6"),
    Case("soft_margin_loss", lambda: F.soft_margin_loss(X, X), 30, "5 x 6"),
    Case("binary_cross_entropy", lambda: F.binary_cross_entropy(X / 2, X), 54, "8 and the mean: 9 x 6"),
    Case(
        "binary_cross_entropy_backward", lambda: aten.binary_cross_entropy_backward(X, X / 2, X, None, 1), 36, "6 x 6"
    ),
    Case(
        "binary_cross_entropy_with_logits",
        lambda: F.binary_cross_entropy_with_logits(X, X, pos_weight=ones(3)),
        84,
        "9, pos_weight 4, mean: 14 x 6",
    ),
    Case("nll_loss_forward", lambda: F.nll_loss(X, torch.tensor([0, 1])), 4, "2 targets: sign, mean"),
    Case(
        "nll_loss_backward",
        lambda: aten.nll_loss_backward(torch.tensor(1.0), X, torch.tensor([0, 1]), None, 1, -100, torch.tensor(2.0)),
        4,
        "2 targets: sign, mean",
    ),
    Case("multi_margin_loss", lambda: F.multi_margin_loss(X, torch.tensor([0, 1])), 36, "6 x 6"),
    Case(
        "_ctc_loss",
        lambda: aten._ctc_loss(ones(5, 2, 4), torch.ones(2, 3, dtype=torch.long), [5, 4], [3, 2]),
        715,
        "cells 5 x 7 + 4 x 5 = 55, 13 each",
    ),
    Case(
        "_ctc_loss",
        lambda: aten._ctc_loss.Tensor(
            ones(5, 2, 4), torch.ones(2, 3, dtype=torch.long), torch.tensor([5, 4]), torch.tensor([3, 2])
        ),
        715,
        "as with lists",
    ),
    Case("_ctc_loss_backward", ctc_backward, 1275, "55 cells x 21, 40 probabilities x 3"),
    # scattered additions
    Case(
        "embedding_dense_backward",
        lambda: aten.embedding_dense_backward(ones(5, 4), torch.tensor([0, 1, 1, 2, 0]), 3, -1, False),
        20,
        "each gradient added",
    ),
    Case(
        "_embedding_bag_forward_only",
        lambda: F.embedding_bag(torch.tensor([[0, 1], [1, 2]]), ones(3, 4)),
        16,
        "4 rows of 4, mean",
    ),
    Case(
        "_embedding_bag_forward_only",
        lambda: F.embedding_bag(torch.tensor([[0, 1], [1, 2]]), ones(3, 4), per_sample_weights=ones(2, 2), mode="sum"),
        32,
        "and weights",
    ),
    Case("scatter_add", lambda: ones(3, 3).scatter_add(0, torch.zeros(2, 3, dtype=torch.long), X), 6, "6 indices"),
    Case("scatter", lambda: ones(3, 3).scatter(0, torch.zeros(2, 3, dtype=torch.long), X), 0, "stored"),
    Case("scatter", lambda: ones(3, 3).scatter(0, torch.zeros(2, 3, dtype=torch.long), X, reduce="add"), 6, "added"),
    Case("index_add", lambda: ones(3, 3).index_add(0, torch.tensor([0, 1]), X, alpha=2), 12, "scaled and added"),
    Case("index_reduce", lambda: ones(3, 3).index_reduce(0, torch.tensor([0, 1]), X, "prod"), 6, "6 products"),
    Case("index_put", lambda: ones(3, 3).index_put((torch.tensor([0, 1]),), X, accumulate=True), 6, "6 additions"),
    Case("index_put", lambda: ones(3, 3).index_put((torch.tensor([0, 1]),), X), 0, "stored"),
    Case(
        "_unsafe_masked_index_put_accumulate",
        lambda: aten._unsafe_masked_index_put_accumulate(
            ones(5), torch.tensor([True, False]), [torch.tensor([0, 1])], ones(2)
        ),
        2,
        "2 values",
    ),
    Case("bincount", lambda: torch.bincount(torch.tensor([0, 1, 1]), ones(3)), 3, "3 weights"),
    Case("bincount", lambda: torch.bincount(torch.tensor([0, 1, 1])), 0, "counting"),
    Case(
        "embedding_renorm",
        lambda: aten.embedding_renorm(ones(3, 4), torch.tensor([0, 1]), 1.0, 2.0),
        24,
        "2 rows of 4: norm 2, scale 1",
    ),
    Case(
        "_embedding_bag_per_sample_weights_backward",
        lambda: meta("_embedding_bag_per_sample_weights_backward", (2, 4), (3, 4), (5,), (2,), (5,), 0),
        40,
        "5 indices x 4 columns x 2",
    ),
    Case(
        "_embedding_bag_dense_backward",
        lambda: meta("_embedding_bag_dense_backward", (2, 4), (5,), (5,), (2,), (2,), 3, False, 0, None),
        20,
        "5 indices x 4 columns",
    ),
    Case("_cdist_forward", lambda: torch.cdist(ones(2, 3, 4), ones(2, 5, 4), p=1.0), 360, "30 pairs x 4 columns x 3"),
    Case(
        "_cdist_backward",
        lambda: aten._cdist_backward(ones(2, 3, 5), ones(2, 3, 4), ones(2, 5, 4), 1.0, ones(2, 3, 5)),
        480,
        "30 pairs x 4 columns x 4",
    ),
    # cells and attention's edges
    Case("_thnn_fused_lstm_cell", lambda: meta("_thnn_fused_lstm_cell", (2, 12), (2, 12), (2, 3)), 132, "22 x 6 units"),
    Case(
        "_thnn_fused_lstm_cell",
        lambda: meta("_thnn_fused_lstm_cell", (2, 12), (2, 12), (2, 3), (12,), (12,)),
        180,
        "30 x 6",
    ),
    Case(
        "_thnn_fused_gru_cell", lambda: meta("_thnn_fused_gru_cell", (2, 9), (2, 9), (2, 3), (9,), (9,)), 138, "23 x 6"
    ),
    Case(
        "_thnn_fused_lstm_cell_backward_impl",
        lambda: meta("_thnn_fused_lstm_cell_backward_impl", (2, 3), None, (2, 3), (2, 3), (2, 12), False),
        138,
        "23 x 6",
    ),
    Case(
        "_transform_bias_rescale_qkv",
        lambda: aten._transform_bias_rescale_qkv(ones(2, 4, 24), ones(24), 2),
        256,
        "192 sums and 64 scales",
    ),
    Case(
        "_compute_linear_combination",
        lambda: aten._compute_linear_combination(ones(3, 2, 2), ones(5, 3)),
        120,
        "5 results of 4 elements, 3 products and sums each",
    ),
    # device kernels, by their arguments
    Case(
        "cudnn_batch_norm",
        lambda: meta("cudnn_batch_norm", (2, 3, 8, 8), (3,), (3,), (3,), (3,), True, 0.1, 1e-5),
        2688,
        "7 x 384",
    ),
    Case(
        "cudnn_batch_norm_backward",
        lambda: meta("cudnn_batch_norm_backward", (2, 3, 8, 8), (2, 3, 8, 8), (3,), (3,), (3,), (3,), (3,), 1e-5, (1,)),
        4992,
        "13 x 384",
    ),
    Case(
        "_batch_norm_with_update",
        lambda: meta("_batch_norm_with_update", (2, 3, 8, 8), (3,), (3,), (3,), (3,), 0.1, 1e-5),
        2688,
        "7 x 384",
    ),
    Case(
        "_batch_norm_no_update",
        lambda: meta("_batch_norm_no_update", (2, 3, 8, 8), None, None, (3,), (3,), 0.1, 1e-5),
        768,
        "2 x 384",
    ),
    Case(
        "batch_norm_gather_stats",
        lambda: meta("batch_norm_gather_stats", (2, 3, 8, 8), (4, 3), (4, 3), None, None, 0.1, 1e-5, 64),
        156,
        "4 ranks x 3 channels x 13",
    ),
    Case(
        "_fused_rms_norm",
        lambda: meta("_fused_rms_norm", (2, 3, 8), [8], (8,), 1e-5),
        192,
        "square, sum, scale, weight: 4 x 48",
    ),
    Case(
        "_fused_rms_norm_backward",
        lambda: meta("_fused_rms_norm_backward", (2, 3, 8), (2, 3, 8), [8], (2, 3, 1), (8,), [True, True]),
        432,
        "xhat 1, dx 6, dw 2: 9 x 48",
    ),
    Case(
        "_cudnn_ctc_loss",
        lambda: meta("_cudnn_ctc_loss", (5, 2, 4), (5,), [5, 4], [3, 2], 0, True, False),
        1990,
        "715 + 1275",
    ),
    Case(
        "cudnn_grid_sampler",
        lambda: meta("cudnn_grid_sampler", (2, 3, 8, 8), (2, 4, 4, 2), out=(2, 3, 4, 4)),
        960,
        "as grid_sampler_2d",
    ),
    Case(
        "cudnn_grid_sampler_backward",
        lambda: meta("cudnn_grid_sampler_backward", (2, 3, 8, 8), (2, 4, 4, 2), (2, 3, 4, 4)),
        3264,
        "as grid_sampler_2d_backward",
    ),
    Case(
        "cudnn_affine_grid_generator_backward",
        lambda: meta("cudnn_affine_grid_generator_backward", (2, 4, 4, 2), 2, 3, 4, 4),
        384,
        "as affine_grid_generator",
    ),
    # torchvision
    Case(
        "torchvision::roi_align",
        lambda: torch.ops.torchvision.roi_align(IMAGE, torch.tensor([[0.0, 0, 0, 4, 4]] * 5), 1.0, 2, 2, 2, False),
        1920,
        "60 results x 4 samples x 4 taps x 2",
    ),
    Case(
        "torchvision::_roi_align_backward",
        lambda: torch.ops.torchvision._roi_align_backward(
            ones(5, 3, 2, 2), torch.tensor([[0.0, 0, 0, 4, 4]] * 5), 1.0, 2, 2, 2, 3, 8, 8, 2, False
        ),
        1920,
        "as its forward",
    ),
    Case(
        "torchvision::_ps_roi_align_backward",
        lambda: meta(
            "_ps_roi_align_backward",
            (5, 1, 2, 2),
            (5, 5),
            (5, 1, 2, 2),
            1.0,
            2,
            2,
            2,
            2,
            4,
            8,
            8,
            namespace="torchvision",
        ),
        640,
        "20 gradients x 4 samples x 4 taps x 2",
    ),
    Case(
        "torchvision::qroi_align",
        lambda: meta(
            "qroi_align",
            (2, 3, 8, 8),
            (5, 5),
            1.0,
            0,
            1.0,
            0,
            1.0,
            2,
            2,
            2,
            False,
            namespace="torchvision",
            out=(5, 3, 2, 2),
        ),
        1920,
        "as roi_align",
    ),
    Case(
        "torchvision::nms",
        lambda: torch.ops.torchvision.nms(torch.tensor([[0.0, 0, 1, 1]] * 4), ones(4), 0.5),
        84,
        "6 pairs x 12, 4 areas x 3",
    ),
]
