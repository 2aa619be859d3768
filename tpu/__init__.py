"""From nothing to a running fine-tune or batch job on Cloud TPUs: ``python -m tpu COMMAND`` in a checkout.

Why ``python -m tpu`` and not ``diffuse-jax tpu``: a laptop that starts TPUs needs a checkout and ``gcloud``, nothing
else. These files use only Python's standard library, so neither JAX nor this package has to be installed there. For
the same reason they are not in the wheel: a module called ``tpu`` in everybody's site-packages would be in the way, and
the training scripts, which are what runs on the slice, come from a checkout too.

==============  ========================================================================================================
``slices.py``   the TPU generations as data: types, topologies, runtime versions, zones, interconnect
``gcloud.py``   running, or printing, ``gcloud``
``cloud.py``    create, wait, status, delete
``remote.py``   install, run, logs, sync, ssh on the workers
``worker.py``   what runs there: one job at a time, its log and state, copies to a bucket
``keep.py``     survive preemption: re-create, install, resume
``jobs.py``     GKE (JobSet) and XPK
``check.py``    the first thing to run on a new VM; this one needs JAX
==============  ========================================================================================================
"""
