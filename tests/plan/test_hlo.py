"""The reader of HLO on programs that XLA:CPU compiled for eight devices, and on lines as XLA:TPU writes them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxmed.plan import hlo
from tests.plan.programs import BATCH, LAYERS, WIDTH

MESH = {'data': 2, 'fsdp': 4}


@pytest.fixture(scope='module')
def texts():
  flags = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
  done = subprocess.run([sys.executable, '-m', 'tests.plan.programs'], env=os.environ | {'XLA_FLAGS': flags},
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def test_a_loop_counts_with_its_rounds(texts):
  got = hlo.cost(texts['gradients'], MESH)
  # Of each layer on 1/8 of the batch: the product, the gradient of the weights, the gradient of the input.
  assert got.flops == 3 * LAYERS * 2 * (BATCH // 8) * WIDTH**2
  assert got.unknown == ()
  reduced = [c for c in got.collectives if c.kind == 'all-reduce']
  assert sum(c.times * c.size for c in reduced) == LAYERS * WIDTH**2 * 4
  assert {(c.group, c.axes) for c in reduced} == {(8, ('data', 'fsdp'))}
  assert sum(c.moved for c in got.collectives) == 2 * 7 / 8 * LAYERS * WIDTH**2 * 4


@pytest.mark.parametrize('name, kind, size, group, axes, times, moved', [
    ('gather', 'all-gather', 8 * 6 * 4, 4, ('fsdp',), 1, 3 / 4 * 192),
    ('scatter', 'reduce-scatter', 8 * 6 * 4, 2, ('data',), 1, 1 / 2 * 192),
    ('exchange', 'all-to-all', 2 * 12 * 4, 4, ('fsdp',), 1, 3 / 4 * 96),
    ('shift', 'collective-permute', 2 * 6 * 4, 2, ('fsdp',), 1, 48),
    ('loop', 'all-reduce', 4 * 6 * 4, 4, ('fsdp',), 5, 5 * 2 * 3 / 4 * 96),
])
def test_each_collective(texts, name, kind, size, group, axes, times, moved):
  got, = hlo.cost(texts[name], MESH).collectives
  assert (got.kind, got.size, got.group, got.axes, got.times) == (kind, size, group, axes, times)
  assert got.moved == moved


@pytest.mark.parametrize('text, devices, want', [
    ('replica_groups={{0,1},{2,3}}, x={}', 4, [[0, 1], [2, 3]]),
    ('replica_groups={}, x', 4, [[0, 1, 2, 3]]),
    ('replica_groups=[2,4]<=[8], x', 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ('replica_groups=[4,2]<=[2,4]T(1,0), x', 8, [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'c'}, x", 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'a','b'}, x", 8, [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x", 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=mesh['a'=8] {'a':(2)2}, x", 8, [[0, 2], [1, 3], [4, 6], [5, 7]]),
])
def test_groups(text, devices, want):
  np.testing.assert_array_equal(hlo.groups(text, devices), want)


TPU = '''HloModule jit_step, num_partitions=8

%all-reduce-scatter.4 (input.4: bf16[8,64]) -> bf16[1,64] {
  %input.4 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-reduce.9 = bf16[8,64]{1,0} all-reduce(%input.4), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
}

%start (p: f32[8,8]) -> f32[64,8] {
  %p = f32[8,8]{1,0:T(1,128)} parameter(0)
  %all-gather.1 = f32[64,8]{1,0} all-gather(%p), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %custom-call.1 = (f32[8,8]{1,0}, f32[64,8]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%piece (p: f32[8,8]) -> f32[64,8] {
  %p = f32[8,8]{1,0:T(1,128)} parameter(0)
  ROOT %all-gather.2 = f32[64,8]{1,0} all-gather(%p), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
}

%cond (c: (s32[], f32[24,8])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[24,8]{1,0}) parameter(0)
  %constant.5 = s32[]{:T(128)} constant(24)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.5), direction=LT
}

%body (b: (s32[], f32[24,8])) -> (s32[], f32[24,8]) {
  %b = (s32[]{:T(128)}, /*index=1*/f32[24,8]{1,0}) parameter(0)
  %x = f32[16,4,5,8]{3,2,1,0:T(8,128)S(1)} parameter(1)
  %y = f32[16,4,6,8]{3,2,1,0:T(8,128)S(1)} parameter(2)
  ROOT %convolution-base-dilated.1 = f32[16,4,5,6]{3,2,1,0:T(8,128)} convolution(%x, %y), window={size=16x4 stride=15x3 lhs_dilate=16x4}, dim_labels=01bf_01oi->01bf
}

ENTRY %main (a: bf16[8,64], g: f32[8,8]) -> bf16[1,64] {
  %a = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %g = f32[8,8]{1,0} parameter(1)
  %constant.0 = s32[]{:T(128)} constant(4)
  %w = f32[24,8]{1,0} constant({...})
  %tuple.1 = (s32[]{:T(128)}, f32[24,8]{1,0}) tuple(%constant.0, %w)
  %while.1 = (s32[]{:T(128)}, f32[24,8]{1,0}) while(%tuple.1), condition=%cond, body=%body
  %fusion.1 = f32[64,8]{1,0} fusion(%g), kind=kCustom, calls=%start
  %fusion.2 = f32[64,8]{1,0} fusion(%g), kind=kCustom, calls=%piece
  ROOT %fusion.3 = bf16[1,64]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.4
}
'''


def test_as_tpus_write_it():
  """Batched products as dilated convolutions, loops without a known count, pieces of one asynchronous gather."""
  got = hlo.cost(TPU, {'data': 8})
  assert got.flops == 20 * 2 * (16 * 4) * 5 * 6 * 8
  assert [(c.kind, c.size, c.moved) for c in got.collectives] == [
      ('all-gather', 64 * 8 * 4, 7 / 8 * 2048), ('reduce-scatter', 8 * 64 * 2, 7 / 8 * 1024)]
  # The operands of the product lie on the chip: only its result is written, 20 times.
  assert got.traffic == 20 * 16 * 4 * 5 * 6 * 4 + 2 * (8 * 8 + 64 * 8) * 4 + (8 * 64 + 64) * 2


SLICES = '''HloModule m

%inner (a: f32[24,8], j: s32[]) -> f32[1,8] {
  %a = f32[24,8]{1,0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %s = f32[1,8]{1,0} dynamic-slice(%a, %j, %j), dynamic_slice_sizes={1,8}
}

%fused (p: f32[24,8], i: s32[], u: f32[1,8]) -> (f32[24,8], f32[1,8]) {
  %p = f32[24,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[1,8]{1,0} parameter(2)
  %q = f32[24,8]{1,0} parameter(3)
  %s = f32[1,8]{1,0} fusion(%q, %i), kind=kLoop, calls=%inner
  %d = f32[24,8]{1,0} dynamic-update-slice(%p, %u, %i, %i)
  ROOT %t = (f32[24,8]{1,0}, f32[1,8]{1,0}) tuple(%d, %s)
}

ENTRY %main (p: f32[24,8], i: s32[], u: f32[1,8]) -> (f32[24,8], f32[1,8]) {
  %p = f32[24,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[1,8]{1,0} parameter(2)
  %q = f32[24,8]{1,0} parameter(3)
  %early = ((f32[24,8]{1,0}), f32[2,8]{1,0:S(1)}, s32[]) slice-start(%q), slice={[0:2], [0:8]}
  %late = f32[2,8]{1,0:S(1)} slice-done(%early)
  ROOT %f = (f32[24,8]{1,0}, f32[1,8]{1,0}) fusion(%p, %i, %u, %q), kind=kLoop, calls=%fused
}
'''


def test_a_slice_moves_its_own_bytes():
  # read: the index (4), the update (32) and the slice (32); written: the update in place (32) and the slice (32);
  # the early slice is read (64) into the memory on the chip
  assert hlo.cost(SLICES).traffic == 4 + 32 + 32 + 32 + 32 + 64


def test_flash_kernels_by_hand():
  """Products of lengths 2560 and 640; what a kernel reads again for every further block of at most 1280."""
  q, k, row = 'bf16[1,2,2560,64]{3,2,1,0}', 'bf16[1,2,640,64]{3,2,1,0}', 'f32[1,2,2560,128]{3,2,1,0}'
  call = 'custom_call_target="tpu_custom_call"'
  text = f'''HloModule test, num_partitions=1
ENTRY %main (p0: {q}) -> {q} {{
  %q = {q} parameter(0)
  %k = {k} parameter(1)
  %v = {k} parameter(2)
  %l = {row} parameter(3)
  %flash_attention.1 = {q} custom-call(%q, %k, %v), {call}
  %flash_mha_bwd_dkv_block_q_640.2 = ({k}, {k}) custom-call(%q, %k, %v, %l, %l, %q, %l), {call}
  ROOT %flash_mha_bwd_dq_block_q_640.3 = {q} custom-call(%q, %k, %v, %l, %l, %q, %l), {call}
}}
'''
  got = hlo.cost(text)
  assert got.flops == (2 + 4 + 3) * 2 * 2 * 2560 * 640 * 64
  queries, keys, rows = 2 * 2 * 2560 * 64, 2 * 2 * 640 * 64, 4 * 2 * 2560 * 128
  forward = 2 * queries + 2 * keys + 2 * keys  # two blocks of queries: keys and values twice
  for_keys = 2 * queries + 2 * keys + 3 * rows + 2 * keys  # one block of keys
  for_queries = 3 * queries + 2 * keys + 3 * rows + 2 * keys
  assert got.traffic == forward + for_keys + for_queries and not got.unknown
  other = hlo.cost(text.replace('%flash_attention.1', '%something.1'))
  assert other.unknown == ('something.1',) and other.flops == got.flops - 2 * 2 * 2 * 2560 * 640 * 64
