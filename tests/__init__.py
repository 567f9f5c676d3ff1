"""The tests; what has to be known before JAX starts is here."""

# Compiling is what the tests spend their time on; tiny networks run fast enough as they come.
# Without the fusion emitters a training step compiles in about half the CPU time.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
