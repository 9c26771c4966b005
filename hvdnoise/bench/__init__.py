"""hvdnoise bench: ways to average gradients, timed side by side in one run.

    horovodrun -np 2 hvdnoise bench --model resnet20
    horovodrun -np 2 hvdnoise bench --model comm:25M --compute_ms 100 --variants all --out RESULTS

A variant is a name (hvdnoise.bench.variants); every one trains a model of its own, from the same
weights on the same batch. Rounds are interleaved: in each, every variant does some steps, in an
order that changes, so that a machine that slows down slows all of them, and the ratios to plain
Horovod *within* a round stay true. How time, bytes and memory are measured: hvdnoise.bench.measure.
"""
