"""What a program is compiled for."""

from distill_jax.distributed import platform


def test_flag_limits_the_instruction_set(monkeypatch, tmp_path):
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=avx --xla_other=1")
  assert platform.instruction_set() == "AVX"
  monkeypatch.delenv("XLA_FLAGS")
  features = tmp_path / "cpuinfo"
  monkeypatch.setattr(platform, "Path", lambda name: features)
  assert platform.instruction_set() == ""
  features.write_text("flags : fpu avx sse4_2 avx2\n")
  assert platform.instruction_set() == "AVX2"
