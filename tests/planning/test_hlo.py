"""Parsing of compiled programs; the text is what XLA prints for v5e."""

from semiseg_jax.planning import hlo

TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={()->f32[]}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}

%fused_computation.873 (p.1: bf16[33,16,5,8], p.2: bf16[3,3,8,8]) -> bf16[17,16,3,8] {
  %p.1 = bf16[33,16,5,8]{1,3,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.2 = bf16[3,3,8,8]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.232 = bf16[17,16,3,8]{1,3,2,0:T(8,128)(2,1)S(1)} convolution(%p.1, %p.2), window={size=3x3 stride=2x2 pad=1_1x0_0}, dim_labels=0b1f_01io->0b1f, metadata={op_name="jit(step)/stem/conv" stack_frame_id=233}
}

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %all-reduce.9 = f32[8,128]{1,0:T(8,128)} all-reduce(%x), channel_id=9, to_apply=%sum
  ROOT %next = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %all-reduce.9)
}

%condition (state.1: (s32[], f32[8,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %yes = pred[]{:T(512)} constant(true)
}

ENTRY %main.1 (x.1: bf16[33,16,5,8], k.1: bf16[3,3,8,8], m.1: f32[2,2,16]) -> f32[2,2,16] {
  %x.1 = bf16[33,16,5,8]{1,3,2,0:T(8,128)(2,1)} parameter(0)
  %k.1 = bf16[3,3,8,8]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %m.1 = f32[2,2,16]{2,1,0:T(2,128)S(1)} parameter(2)
  %copy-start.1 = (bf16[33,16,5,8]{1,3,2,0:T(8,128)(2,1)S(1)}, bf16[33,16,5,8]{1,3,2,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x.1)
  %copy-done.1 = bf16[33,16,5,8]{1,3,2,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %slice-start.2 = ((bf16[33,16,5,8]{1,3,2,0:T(8,128)(2,1)}), bf16[11,16,5,8]{1,3,2,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x.1), slice={[0:11], [0:16], [0:5], [0:8]}
  %slice-done.2 = bf16[11,16,5,8]{1,3,2,0:T(8,128)(2,1)S(1)} slice-done(%slice-start.2)
  %fusion.476 = bf16[17,16,3,8]{1,3,2,0:T(8,128)(2,1)S(1)} fusion(%copy-done.1, %k.1), kind=kOutput, calls=%fused_computation.873, metadata={op_name="jit(step)/stem/conv"}
  %all-reduce.84 = (f32[2,2,16]{2,1,0:T(2,128)S(1)}, f32[2,2,16]{2,1,0:T(2,128)S(1)}) all-reduce(%m.1, /*index=1*/%m.1), channel_id=7, to_apply=%sum
  %custom-call.1 = f32[8,128]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %custom-call.2 = f32[8,128]{1,0:T(8,128)} custom-call(%custom-call.1, %m.1), custom_call_target="tpu_custom_call"
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %custom-call.2)
  %while.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %last = f32[2,2,16]{2,1,0:T(2,128)S(1)} get-tuple-element(%all-reduce.84), index=0
}
"""  # noqa: E501

MOMENTS = 2 * 2 * 128 * 4  # f32[2,2,16]: the 16 channels are padded to a tile of 128
BLOCK = 8 * 128 * 4  # f32[8,128]
IMAGES = 33 * 5 * 8 * 128 * 2  # bf16[33,16,5,8]: axis 1 is innermost and padded to a tile of 128
KERNEL = 3 * 3 * 8 * 128 * 2
FEATURES = 17 * 3 * 8 * 128 * 2


def test_collectives_by_kind_include_those_in_loops():
    module = hlo.Module(TEXT)
    assert module.collectives() == {"all-reduce": (1 + 5, 2 * MOMENTS + 5 * BLOCK)}


def test_dtypes_of_convolutions_inside_fusions():
    assert hlo.Module(TEXT).convolution_dtypes() == {("bf16", "bf16"): 1}


def test_custom_call_bytes_exclude_reserved_memory():
    assert hlo.Module(TEXT).custom_call_bytes() == BLOCK + MOMENTS + BLOCK


def test_traffic_by_instruction_in_total_and_in_main_memory():
    traffic = {t.instruction.name: (t.total, t.main_memory) for t in hlo.Module(TEXT).traffic()}
    assert traffic == {
        "copy-start.1": (2 * IMAGES, IMAGES),
        "slice-start.2": (2 * IMAGES // 3, IMAGES // 3),
        "fusion.476": (IMAGES + KERNEL + FEATURES, KERNEL),
        "all-reduce.84": (4 * MOMENTS, 0),
        "custom-call.2": (2 * BLOCK + MOMENTS, 2 * BLOCK),
        "all-reduce.9": (5 * 2 * BLOCK, 5 * 2 * BLOCK),
    }


def test_traffic_by_layer():
    layers = hlo.Module(TEXT).traffic_by_layer()
    assert layers["stem"] == (IMAGES + KERNEL + FEATURES, KERNEL)
    assert list(layers) == ["outside of layers", "stem"]  # the largest first
    backward = hlo.Instruction("a", "fusion", (), (), 'op_name="jit(f)/transpose(jvp(N))/stem/mul"')
    assert backward.layer == "stem, backward"


def test_an_async_call_of_a_slice_counts_once():
    """Dumped programs contain slices in this form."""
    direct = "slice-start(%x.1), slice={[0:11], [0:16], [0:5], [0:8]}"
    wrapped = """\
%async (p.3: bf16[33,16,5,8]) -> bf16[11,16,5,8] {
  %p.3 = bf16[33,16,5,8]{1,3,2,0:T(8,128)(2,1)} parameter(0)
  ROOT %slice.4 = bf16[11,16,5,8]{1,3,2,0:T(8,128)(2,1)S(1)} slice(%p.3), slice={[0:11], [0:16], [0:5], [0:8]}
}

ENTRY"""  # noqa: E501
    text = TEXT.replace(direct, "async-start(%x.1), calls=%async").replace("ENTRY", wrapped)
    traffic = {t.instruction.name: (t.total, t.main_memory) for t in hlo.Module(text).traffic()}
    assert traffic["slice.4"] == (2 * IMAGES // 3, IMAGES // 3)
    assert "slice-start.2" not in traffic
