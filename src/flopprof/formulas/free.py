"""Operators without elementwise cost: free (no arithmetic of the counted kind) and uncounted (no formula yet)."""

from __future__ import annotations

_VIEWS = """alias as_strided expand expand_as permute transpose t mT mH matrix_H numpy_T adjoint swapaxes swapdims
    movedim moveaxis view view_as view_as_real view_as_complex _reshape_alias reshape reshape_as _reshape_copy
    flatten unflatten ravel squeeze unsqueeze select slice narrow diagonal linalg_diagonal unfold unbind split
    split_with_sizes tensor_split chunk hsplit vsplit dsplit unsafe_split unsafe_split_with_sizes unsafe_chunk
    broadcast_to broadcast_tensors real imag _conj conj resolve_conj _neg_view resolve_neg detach data set_data set
    _unsafe_view lift lift_fresh positive atleast_1d atleast_2d atleast_3d slice_inverse
    _test_autograd_multiple_dispatch_view indices _indices values _values crow_indices col_indices ccol_indices
    row_indices _sparse_broadcast_to alias_copy as_strided_copy expand_copy permute_copy transpose_copy t_copy
    view_copy view_as_real_copy view_as_complex_copy _reshape_alias_copy squeeze_copy unsqueeze_copy select_copy
    slice_copy narrow_copy diagonal_copy unfold_copy unbind_copy split_copy split_with_sizes_copy _conj_copy
    _neg_view_copy detach_copy lift_fresh_copy indices_copy _indices_copy values_copy _values_copy crow_indices_copy
    col_indices_copy ccol_indices_copy row_indices_copy _sparse_broadcast_to_copy _fw_primal_copy _make_dual_copy
    _nested_view_from_buffer_copy _nested_view_from_jagged_copy _nested_get_values_copy
    _test_autograd_multiple_dispatch_view_copy inductor::_reinterpret_tensor inductor::_alloc_from_pool
    prims::as_strided prims::broadcast_in_dim prims::collapse_view prims::conj prims::split_dim prims::squeeze
    prims::transpose prims::view_of prims::view_of_dtype prims::real prims::imag"""

_COPIES = """clone copy _to_copy to type_as contiguous _copy_from _copy_from_and_resize copy_sparse_to_sparse
    _lazy_clone shallow_copy_data pin_memory _pin_memory cat concat concatenate stack _stack hstack vstack dstack
    column_stack row_stack block_diag _chunk_cat repeat tile repeat_interleave roll flip fliplr flipud rot90 tril
    triu diag_embed diag diagflat constant_pad_nd pad _pad_circular _pad_enum reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d channel_shuffle native_channel_shuffle
    pixel_shuffle pixel_unshuffle im2col complex chalf _cast_Byte _cast_Char _cast_Double _cast_Float _cast_Half
    _cast_Int _cast_Long _cast_Short _autocast_to_full_precision _autocast_to_reduced_precision _foreach_copy
    _foreach_clone as_strided_scatter diagonal_scatter select_scatter slice_scatter slice_backward select_backward
    diagonal_backward meshgrid cartesian_prod upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d max_unpool2d max_unpool3d lu_unpack
    flatten_dense_tensors unflatten_dense_tensors _new_zeros_with_same_feature_meta quantized::cat quantized::cat_out
    quantized::cat_relu quantized::cat_relu_out quantized::embedding_4bit quantized::embedding_byte
    inductor::resize_storage_bytes quantization::_Bfloat16QuantizedToFloat quantization::_FloatToBfloat16Quantized
    _inductor_test::realize flex_lib::zeros_and_scatter flex_gemm::to_blocked prims::as_strided_scatter
    prims::collapse prims::cat prims::clone prims::convert_element_type prims::copy_strided prims::copy_to
    prims::device_put prims::reshape prims::rev"""

_FACTORIES = """empty empty_like empty_strided empty_permuted empty_quantized new_empty new_empty_strided new_full
    new_ones new_zeros zeros zeros_like ones ones_like full full_like fill zero _foreach_zero _efficientzerotensor
    arange range linspace logspace eye tril_indices triu_indices scalar_tensor from_file bartlett_window
    blackman_window hamming_window hann_window kaiser_window fft_fftfreq fft_rfftfreq resize resize_as _resize_output
    resize_as_sparse sparse_resize sparse_resize_and_clear _make_dep_token _histogramdd_bin_edges fill_diagonal
    _cudnn_init_dropout_state prims::empty prims::empty_permuted prims::empty_strided prims::fill prims::full
    prims::full_like prims::iota prims::resize prims::scalar_tensor prims::_make_token prims::_sink_tokens
    prims::maximum_value prims::minimum_value"""

_RANDOM = """rand rand_like randn randn_like randint randint_like randperm random uniform normal normal_functional
    log_normal exponential geometric cauchy bernoulli binomial poisson multinomial _standard_gamma _sample_dirichlet
    _fill_mem_eff_dropout_mask _philox_key_fold_in _philox_key_split _philox_normal _philox_randint _philox_uniform
    _sobol_engine_draw _sobol_engine_ff _sobol_engine_initialize_state _sobol_engine_scramble prims::normal
    prims::uniform rngprims::philox_rand inductor_prims::inductor_reserve_rng_state"""

_COMPARISONS = """eq ne lt le gt ge equal not_equal less less_equal greater greater_equal isnan isinf isneginf
    isposinf isreal isin signbit logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor
    bitwise_not bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__
    __ixor__ __ilshift__ __irshift__ any all _is_all_true _is_any_true where masked_fill nan_to_num count_nonzero
    hash_tensor is_nonzero prims::eq prims::ne prims::lt prims::le prims::gt prims::ge prims::isfinite prims::signbit
    prims::where prims::bitwise_and prims::bitwise_or prims::bitwise_xor prims::bitwise_not prims::shift_left
    prims::shift_right_arithmetic prims::xor_sum"""

_INDEXING = """index _unsafe_index _unsafe_masked_index index_select index_copy index_fill gather take masked_select
    masked_scatter masked_scatter_backward nonzero nonzero_static nonzero_numpy argwhere embedding sort argsort msort
    topk kthvalue median nanmedian mode argmax argmin searchsorted bucketize unique_dim unique_consecutive
    unique_dim_consecutive _unique _unique2"""

_SPARSE_AND_NESTED = """_coalesce _coalesced coalesce is_coalesced _nnz _dimI _dimV dense_dim sparse_dim sparse_mask
    _sparse_mask_projection to_dense _to_dense to_sparse _to_sparse to_sparse_csr to_sparse_csc to_sparse_bsr
    to_sparse_bsc _to_sparse_csr _to_sparse_csc _to_sparse_bsr _to_sparse_bsc sparse_coo_tensor
    sparse_compressed_tensor _sparse_compressed_tensor_with_dims _sparse_coo_tensor_with_dims
    _sparse_coo_tensor_with_dims_and_tensors _sparse_sum_backward _spdiags _convert_indices_from_coo_to_csr
    _convert_indices_from_csr_to_coo _validate_compressed_sparse_indices _cslt_compress _to_sparse_semi_structured
    _sparse_semi_structured_tile _sparse_semi_structured_apply _sparse_semi_structured_apply_dense
    _pack_padded_sequence _pack_padded_sequence_backward _pad_packed_sequence pad_sequence to_padded_tensor
    nested_to_padded_tensor _jagged_to_padded_dense_forward _padded_dense_to_jagged_forward _nested_from_padded
    _nested_from_padded_and_nested_example _nested_from_padded_tensor _nested_tensor_from_mask
    _nested_tensor_from_mask_left_aligned _nested_tensor_from_tensor_list _nested_view_from_buffer
    _nested_view_from_jagged _nested_get_values _nested_get_offsets _nested_get_lengths _nested_get_min_seqlen
    _nested_get_max_seqlen _nested_get_ragged_idx _nested_get_jagged_dummy _nested_compute_contiguous_strides_offsets
    _nested_tensor_size _nested_tensor_strides _nested_tensor_storage_offsets _nested_select_backward
    _nested_sum_backward"""

_QUANTIZED_LAYOUTS = """quantize_per_tensor quantize_per_channel quantize_per_tensor_dynamic dequantize int_repr
    q_scale q_zero_point q_per_channel_scales q_per_channel_zero_points q_per_channel_axis qscheme
    _make_per_tensor_quantized_tensor _make_per_channel_quantized_tensor _empty_affine_quantized
    _empty_per_channel_affine_quantized _convert_weight_to_int4pack _convert_weight_to_int4pack_for_cpu
    _dyn_quant_pack_4bit_weight to_mkldnn _mkldnn_reshape _mkldnn_transpose mkldnn_reorder_conv2d_weight
    mkldnn_reorder_conv3d_weight _cudnn_rnn_flatten_weight _wrapped_linear_prepack _saturate_weight_to_fp16
    _choose_qparams_per_tensor choose_qparams_optimized _rowwise_prune fbgemm_linear_quantize_weight
    fbgemm_pack_gemm_matrix_fp16 fbgemm_pack_quantized_matrix mkldnn::_reorder_convolution_weight
    mkldnn::_reorder_convolution_transpose_weight mkldnn::_reorder_linear_weight
    mkldnn::_reorder_mkldnn_rnn_layer_weight mkldnn::_get_mkldnn_serialized_md mkldnn::_nbytes mkldnn::data_ptr
    mkldnn::_is_mkldnn_acl_supported mkldnn::_is_mkldnn_bf16_supported mkldnn::_is_mkldnn_fp16_supported
    mkldnn_prepacked::conv2d_prepack mkl::_mkl_reorder_linear_weight onednn::qconv_prepack onednn::qlinear_prepack
    onednn::linear_prepack_fp16 quantized::conv_prepack quantized::conv1d_prepack quantized::conv2d_prepack
    quantized::conv3d_prepack quantized::conv_transpose1d_prepack quantized::conv_transpose2d_prepack
    quantized::conv_transpose3d_prepack quantized::conv_unpack quantized::conv1d_unpack quantized::conv2d_unpack
    quantized::conv3d_unpack quantized::conv_transpose1d_unpack quantized::conv_transpose2d_unpack
    quantized::conv_transpose3d_unpack quantized::conv2d_unpack_sizes quantized::linear_prepack
    quantized::linear_prepack_fp16 quantized::linear_prepack_legacy quantized::linear_prepack_fp16_legacy
    quantized::linear_unpack quantized::linear_unpack_fp16 quantized::embedding_bag_prepack
    quantized::embedding_bag_unpack quantized::embedding_bag_byte_prepack quantized::embedding_bag_byte_unpack
    quantized::embedding_bag_4bit_prepack quantized::embedding_bag_4bit_unpack quantized::embedding_bag_2bit_prepack
    quantized::embedding_bag_2bit_unpack quantized::embedding_bag_byte_prepack_with_rowwise_min_max
    quantized::embedding_bag_4bit_prepack_with_rowwise_min_max
    quantized::embedding_bag_2bit_prepack_with_rowwise_min_max quantized::make_quantized_cell_params
    quantized::make_quantized_cell_params_dynamic quantized::make_quantized_cell_params_fp16
    _quantized::_wrapped_linear_prepack _quantized::conv2d_prepack _quantized::conv3d_prepack
    _quantized::conv_transpose1d_prepack _quantized::conv_transpose2d_prepack _quantized::conv_transpose3d_prepack
    _quantized::linear_prepack _quantized::linear_prepack_fp16 _quantized::linear_prepack_fp16_legacy
    _quantized::linear_prepack_legacy _quantized::wrapped_fbgemm_pack_gemm_matrix_fp16 sparse::qlinear_prepack
    sparse::qlinear_unpack"""

_BOOKKEEPING = """size stride numel dim storage_offset is_contiguous is_pinned is_same_size is_set_to is_complex
    is_floating_point is_signed is_conj is_neg is_inference is_leaf is_distributed output_nr _version requires_grad
    retain_grad retains_grad result_type get_device item _local_scalar_dense sym_size sym_stride sym_numel
    sym_storage_offset sym_is_contiguous sym_constrain_range sym_constrain_range_for_size
    _functional_sym_constrain_range _functional_sym_constrain_range_for_size _assert_async _assert_scalar
    _functional_assert_async _functional_assert_scalar _assert_tensor_metadata _fw_primal _make_dual _unpack_dual
    _is_zerotensor _has_same_storage_numel _has_compatible_shallow_copy_type _debug_has_internal_overlap
    record_stream _fused_sdp_choice _use_cudnn_ctc_loss _use_miopen_ctc_loss _linalg_check_errors cudnn_is_acceptable
    _nnpack_available _shape_as_tensor _dim_arange _add_batch_dim _remove_batch_dim _propagate_xla_data
    _validate_sparse_coo_tensor_args _test_parallel_materialize prims::item torchvision::_cuda_version
    export::access_subclass_inner_tensor"""

_COMMUNICATION = """symm_mem::_barrier symm_mem::_low_contention_all_gather
    symm_mem::_low_contention_all_gather_ce_multicast symm_mem::_low_contention_all_gather_ce_multicast_out
    symm_mem::_low_contention_reduce_scatter symm_mem::_rendezvous symm_mem::all_to_all_vdev
    symm_mem::all_to_all_vdev_2d symm_mem::all_to_all_vdev_2d_offset symm_mem::get_remote_tensors
    symm_mem::memcpy_to_multicast symm_mem::memset32 symm_mem::multi_root_tile_reduce
    symm_mem::multimem_all_gather_out symm_mem::multimem_all_reduce symm_mem::multimem_one_shot_all_reduce
    symm_mem::multimem_one_shot_all_reduce_out symm_mem::multimem_one_shot_reduce_out symm_mem::nccl_all_to_all_nd
    symm_mem::nccl_get symm_mem::nccl_get_out symm_mem::nccl_put symm_mem::nccl_put_signal
    symm_mem::nccl_put_with_signal symm_mem::nccl_reduce_scatter_offset symm_mem::nccl_wait_for_signal
    symm_mem::nccl_wait_signal symm_mem::nvshmem_all_to_all symm_mem::nvshmem_broadcast symm_mem::nvshmem_get
    symm_mem::nvshmem_get_out symm_mem::nvshmem_put symm_mem::nvshmem_put_with_signal
    symm_mem::nvshmem_wait_for_signal symm_mem::one_shot_all_reduce symm_mem::one_shot_all_reduce_copy
    symm_mem::one_shot_all_reduce_copy_out symm_mem::one_shot_all_reduce_out symm_mem::reduce_scatter_out
    symm_mem::stream_write_value32 symm_mem::tile_reduce symm_mem::two_shot_all_reduce
    symm_mem::two_shot_all_reduce_out"""


def _names(text: str) -> frozenset[str]:
    return frozenset(name if "::" in name else f"aten::{name}" for name in text.split())


FREE_GROUPS: dict[str, frozenset[str]] = {
    "views, and their copies": _names(_VIEWS),
    "copies, casts, concatenation, padding": _names(_COPIES),
    "factories and fills": _names(_FACTORIES),
    "random numbers": _names(_RANDOM),
    "comparisons, logic, bits, selection": _names(_COMPARISONS),
    "indexing, searching, sorting": _names(_INDEXING),
    "sparse, packed and nested layouts": _names(_SPARSE_AND_NESTED),
    "quantised values and prepacked weights": _names(_QUANTIZED_LAYOUTS),
    "communication through symmetric memory": _names(_COMMUNICATION),
    "shape queries, checks, autograd bookkeeping": _names(_BOOKKEEPING),
}

FREE: frozenset[str] = frozenset().union(*FREE_GROUPS.values())

FREE_NAMESPACES: frozenset[str] = frozenset(
    {
        # the interpreter's and the compiler's own
        "prim", "profiler", "export", "debugprims", "debug_mode_ops", "onnx_symbolic", "rngprims", "inductor_prims",
        # devices, streams, memory
        "coor", "cuda", "mempool", "streams",
        # communication: what a collective adds up is not the model's arithmetic
        "c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "fsdp",
        # file formats
        "image",
    }
)  # fmt: skip

_DECOMPOSITION = "matrix decomposition: iterates until it converges"
_SOLVE = "solves equations"
_BOXES = "bins or polygons that depend on the boxes"
_LABELS = "pairs of labels that depend on the targets"
_OWN_TEST = "torch's own test operator"


def _reasons(groups: dict[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in groups.items() for name in sorted(_names(names))}


UNCOUNTED: dict[str, str] = _reasons(
    {
        _DECOMPOSITION: """_linalg_eigh _linalg_eigvals _linalg_svd linalg_eig linalg_eigvals
            linalg_cholesky_ex linalg_qr geqrf linalg_householder_product ormqr linalg_lu linalg_lu_factor_ex
            linalg_ldl_factor_ex linalg_polar linalg_matrix_sqrth linalg_pinv prims::svd
            _native::linalg_polar_native_2 _native::linalg_polar_out_native_3""",
        _SOLVE: """_linalg_det _linalg_slogdet _linalg_solve_ex linalg_inv_ex linalg_lu_solve linalg_ldl_solve
            linalg_lstsq cholesky_solve _cholesky_solve_helper
            cholesky_inverse _spsolve""",
        "matrix exponential: as many products as its norm asks for": "linalg_matrix_exp",
        _BOXES: """torchvision::roi_pool torchvision::ps_roi_pool torchvision::_ps_roi_pool_backward
            torchvision::box_iou_rotated""",
        _LABELS: "multilabel_margin_loss_forward multilabel_margin_loss_backward",
        "rows of a packed table added up: its width is not a shape": """quantized::embedding_bag_byte
            quantized::embedding_bag_4bit quantized::embedding_bag_byte_rowwise_offsets
            quantized::embedding_bag_4bit_rowwise_offsets quantized::embedding_bag_2bit_rowwise_offsets""",
        "times candidate kernels; what they multiply is thrown away": "_cslt_sparse_mm_search",
        _OWN_TEST: """_foobar _test_autograd_multiple_dispatch _test_functorch_fallback
            _test_optional_filled_intlist _test_optional_floatlist _test_optional_intlist _test_warn_in_autograd""",
    }
)
