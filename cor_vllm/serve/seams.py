"""Every name of vLLM that this plugin wraps or reads: the one table to go through for another version.

`compat.check` looks for the names when the plugin is installed and `compat.wrap` puts our functions in their
place; tests/unit/test_seams.py looks for all of them, on each version of vLLM that is supported.
"""

from typing import NamedTuple

Version = tuple[int, int]


class Seam(NamedTuple):
    """Names of vLLM that belong together, and what they are to us.

    A name is an attribute of a module or a class, a field, an attribute that a class gives to its instances,
    or a parameter of a function.
    """

    module: str
    owner: str  # a class or function in the module, dotted if it is below another; "" for the module itself
    names: tuple[str, ...]
    why: str  # goes on after "cor-vllm needs to"
    # The function of ours, module:name below cor_vllm, that takes the original and returns what replaces it.
    wrapped_by: str = ""
    since: Version | None = None  # the first version that has the names; None: all that are supported have
    # Only the test looks for the names: at install their module is not imported yet, or they stand in its
    # source alone, which takes long to read.
    late: bool = False
    delete_when: str = ""  # empty for what stays as long as the plugin does


_CPU_IS_RIGHT = "vLLM's CPU build no longer has the faults that serve/cpu.py describes"
_FUSED_MOE = "vllm.model_executor.layers.fused_moe"

# What is wrapped even if COR_DISABLE switches the plugin off: the flags stay known.
FLAGS = (
    Seam("vllm.engine.arg_utils", "EngineArgs", ("add_cli_args",),
         "add the --cor-… flags", "serve.start:add_cli_args"),
    Seam("vllm.engine.arg_utils", "EngineArgs", ("from_cli_args",),
         "read the --cor-… flags", "serve.start:from_cli_args"),
    Seam("vllm.engine.arg_utils", "EngineArgs", ("create_engine_config",),
         "check a scores file before an engine starts", "serve.start:create_engine_config"),
)  # fmt: skip

# ---- an engine starts

_CONFIGURATION = (
    Seam("vllm.engine.arg_utils", "EngineArgs", ("additional_config",),
         "hand its options to every process of an engine"),
    Seam("vllm.engine.arg_utils", "EngineArgs", ("_api_process_count", "_api_process_rank"),
         "let one of several API servers write the log of the start"),
    Seam("vllm.engine.arg_utils", "EngineArgs",
         ("create_model_config", "attention_backend", "attention_config", "compilation_config"),
         "choose what latent attention needs on a CPU",
         delete_when=_CPU_IS_RIGHT),
    Seam("vllm.config", "VllmConfig", ("additional_config",), "find its options in every process"),
    Seam("vllm.config", "VllmConfig",
         ("model_config", "parallel_config", "load_config", "device_config", "speculative_config",
          "compilation_config", "attention_config", "kv_transfer_config"),
         "know the engine that it routes"),
    Seam("vllm.config", "", ("get_current_vllm_config",), "know the engine that a layer is built for"),
    Seam("vllm.config", "VllmConfig", ("aux_output_config",), "find --enable-return-routed-experts"),
    Seam("vllm.config.aux_output", "AuxOutputConfig", ("enable_return_routed_experts",),
         "return the experts of layers of unequal k"),
    Seam("vllm.config", "ModelConfig", ("model_arch_config",), "return the experts of layers of unequal k",
         late=True),
    Seam("vllm.config.model_arch", "ModelArchitectureConfig", ("num_experts_per_token",),
         "return the experts of layers of unequal k"),
    Seam("vllm.config", "ModelConfig",
         ("model", "revision", "dtype", "architecture", "get_total_num_hidden_layers", "get_num_experts",
          "get_num_experts_per_tok", "get_vocab_size"),
         "compare the model with the scores file"),
    Seam("vllm.config", "ModelConfig", ("using_transformers_backend",),
         "refuse a back end that routes in its own code"),
    Seam("vllm.config", "ModelConfig", ("get_layers_start_end_indices",),
         "know the layers of a pipeline stage"),
    Seam("vllm.config", "ModelConfig", ("use_mla", "is_deepseek_mla", "hf_text_config"),
         "know a model with latent attention on a CPU",
         delete_when=_CPU_IS_RIGHT),
    Seam("vllm.config", "SpeculativeConfig", ("method",), "refuse draft models"),
    Seam("vllm.config", "ParallelConfig", ("enable_elastic_ep", "all2all_backend"),
         "refuse engines in which it would be bypassed"),
    Seam("vllm.config", "ParallelConfig", ("_api_process_rank",),
         "let one of several API servers count"),
    Seam("vllm.config", "LoadConfig", ("load_format",), "know which files hold the routers"),
    Seam("vllm.config", "DeviceConfig", ("device",), "put its buffers on the device"),
    Seam("vllm.config", "AttentionConfig", ("backend",), "know what latent attention runs on",
         delete_when=_CPU_IS_RIGHT),
    Seam("vllm.config", "CompilationConfig", ("mode",), "know whether a model runs in Python"),
    Seam("vllm.config", "CompilationMode", ("NONE",), "know whether a model runs in Python"),
    Seam("vllm.config", "CompilationConfig", ("custom_ops", "is_custom_op_enabled"),
         "leave out the CPU's kernel for rotary embeddings",
         delete_when=_CPU_IS_RIGHT),
    Seam("vllm.platforms", "current_platform", ("is_cpu", "get_cpu_architecture"), "know a CPU"),
    Seam("vllm.platforms", "CpuArchEnum", ("X86",), "know a CPU with AMX",
         delete_when=_CPU_IS_RIGHT),
    Seam("vllm.v1.attention.backends.registry", "AttentionBackendEnum", ("CPU_MLA",),
         "choose what latent attention needs on a CPU", late=True,
         delete_when=_CPU_IS_RIGHT),
)  # fmt: skip

_LOADER = (
    Seam("vllm.model_executor.model_loader", "", ("get_model_loader",), "find the files that are loaded"),
    Seam("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader._prepare_weights",
         ("subfolder", "revision", "fall_back_to_pt", "allow_patterns_overrides"),
         "find the files that are loaded"),
    Seam("vllm.model_executor.model_loader.weight_utils", "", ("_natural_sort_key",),
         "read the files in the loader's order"),
)  # fmt: skip

# ---- the layers of a model

_LAYERS = (
    Seam(f"{_FUSED_MOE}.layer", "", ("FusedMoEFactory",),
         "give each MoE layer its k and its router", "serve.layers:factory"),
    Seam(f"{_FUSED_MOE}.layer", "FusedMoEFactory",
         ("prefix", "top_k", "num_experts", "router_logits_dtype"), "know the layer that is built"),
    Seam(f"{_FUSED_MOE}.layer", "FusedMoEFactory",
         ("router", "custom_routing_function", "hash_indices_table", "zero_expert_type", "bias_vl",
          "fuse_shared_experts", "apply_router_weight_on_input", "scoring_func", "use_grouped_topk",
          "num_expert_group", "topk_group", "e_score_correction_bias"),
         "refuse layers that select in another way"),
    Seam("vllm.envs", "", ("VLLM_MOE_ROUTING_SIMULATION_STRATEGY",),
         "refuse layers that select in another way"),
    # Wrapped while a layer is built (serve/layers.py).
    Seam(f"{_FUSED_MOE}.layer", "", ("create_fused_moe_router",), "give each MoE layer its router"),
    Seam(f"{_FUSED_MOE}.layer", "create_fused_moe_router",
         ("renormalize", "scoring_func", "routed_scaling_factor", "e_score_correction_bias",
          "use_grouped_topk", "num_expert_group", "topk_group", "skip_padding"),
         "know how the model's own router scores"),
    Seam("vllm.model_executor.models.utils", "", ("extract_layer_index",),
         "know a layer's number by its name"),
    Seam(f"{_FUSED_MOE}.runner.moe_runner", "MoERunner", ("is_monolithic",),
         "refuse kernels that route inside themselves"),
    Seam(f"{_FUSED_MOE}.runner.moe_runner", "MoERunner", ("router", "routed_experts"),
         "find the router and the experts of a layer", late=True),
    Seam(f"{_FUSED_MOE}.routed_experts", "RoutedExperts", ("quant_method",), "name a layer's kernel",
         late=True),
    Seam(f"{_FUSED_MOE}.fused_moe_method_base", "FusedMoEMethodBase", ("moe_kernel",),
         "name a layer's kernel", late=True),
    Seam(f"{_FUSED_MOE}.modular_kernel", "FusedMoEKernel", ("fused_experts",),
         "name a layer's kernel", late=True),
    Seam(f"{_FUSED_MOE}.expert_substitution", "", ("SubstitutedRoutedExperts",),
         "refuse experts that constants replace (compat.SUBSTITUTED_EXPERTS)", since=(0, 33), late=True,
         delete_when="CoR is tested on a MoNE checkpoint"),
)  # fmt: skip

_ROUTER = (
    Seam(f"{_FUSED_MOE}.router.base_router", "BaseRouter.__init__",
         ("top_k", "global_num_experts", "eplb_state"), "be a router of vLLM's"),
    Seam(f"{_FUSED_MOE}.router.base_router", "BaseRouter",
         ("set_capture_fn", "routing_method_type", "_compute_routing"), "be a router of vLLM's"),
    Seam(f"{_FUSED_MOE}.router.base_router", "BaseRouter._compute_routing",
         ("hidden_states", "router_logits", "indices_type", "input_ids"), "be a router of vLLM's"),
    Seam(f"{_FUSED_MOE}.router.base_router", "BaseRouter", ("top_k", "global_num_experts", "eplb_state"),
         "take on what the model's own router was made with", late=True),
    Seam(f"{_FUSED_MOE}.router.base_router", "BaseRouter", ("supports_monolithic_kernels",),
         "refuse kernels that route inside themselves (compat.AlwaysAsked)", since=(0, 33),
         delete_when="0.32 is no longer supported: move AlwaysAsked into CorRouter"),
    Seam(f"{_FUSED_MOE}.router.cpu_router", "", ("CPURouter",), "know a CPU's router"),
    Seam(f"{_FUSED_MOE}.config", "RoutingMethodType", ("Custom",),
         "refuse kernels that route inside themselves"),
    Seam("vllm.forward_context", "", ("get_forward_context", "is_forward_context_available"),
         "know the rows that stand for no token"),
    Seam("vllm.forward_context", "ForwardContext", ("is_padding",), "know the rows that stand for no token"),
    Seam("vllm.envs", "", ("VLLM_MOE_SKIP_PADDING",), "mark rows that stand for no token as vLLM does"),
)  # fmt: skip

# ---- a worker checks its own routing

_WORKER = (
    Seam("vllm.v1.worker.worker_base", "WorkerBase", ("__init__",),
         "check the routing of every worker before it serves", "verify.worker:init"),
    Seam("vllm.v1.worker.worker_base", "WorkerBase", ("get_model",), "find the layers of a worker"),
    Seam("vllm.v1.worker.worker_base", "WorkerBase", ("vllm_config", "rank"),
         "find the layers of a worker", late=True),
    # Wrapped on each instance: the CPU's worker must patch torch before vLLM's workers see it.
    Seam("vllm.v1.worker.gpu_worker", "Worker",
         ("load_model", "reload_weights", "finish_weight_update", "determine_available_memory"),
         "check the routing whenever a worker has got weights", late=True),
    Seam(f"{_FUSED_MOE}.router.base_router", "BaseRouter.select_experts", ("router_logits",),
         "watch what a router is given"),
    Seam(f"{_FUSED_MOE}.router.base_router", "BaseRouter._apply_eplb_mapping", ("topk_ids",),
         "watch what a router selects"),
    Seam(f"{_FUSED_MOE}.routed_experts", "RoutedExperts.forward_modular", ("topk_ids", "topk_weights"),
         "watch what a kernel is given"),
    Seam("vllm.model_executor.layers.linear", "UnquantizedLinearMethod", ("apply",),
         "read the router that a worker has loaded"),
    Seam("vllm.model_executor.layers.linear", "LinearBase",
         ("quant_method", "params_dtype", "input_size", "output_size"),
         "read the router that a worker has loaded", late=True),
)  # fmt: skip

# ---- a router file replaces a router (serve/gate.py, serve/overlaid.py)

_OVERLAY = (
    Seam("vllm.model_executor.layers.linear", "", ("ReplicatedLinear",), "know a router that is not sharded"),
    Seam("vllm.model_executor.layers.utils", "", ("dispatch_cpu_unquantized_gemm",),
         "pack a router for its kernel on a CPU"),
    Seam("vllm._custom_ops", "CPUDNNLGEMMHandler", ("handler_tensor",), "replace a packed router", late=True),
    Seam(f"{_FUSED_MOE}.runner.moe_runner", "MoERunner", ("_fse_fuse_gate",),
         "refuse a router that is fused with another", late=True),
    Seam(f"{_FUSED_MOE}.router.gate_linear", "GateLinear", ("_rocm_bf16x3_weight_eligible",),
         "refuse a router that its kernel holds twice", late=True),
    Seam(f"{_FUSED_MOE}.router.cpu_router", "CPURouter",
         ("scoring_func", "use_grouped_topk", "num_expert_group", "topk_group", "e_score_correction_bias"),
         "know how vLLM's own router selects", late=True),
    Seam(f"{_FUSED_MOE}.router.grouped_topk_router", "GroupedTopKRouter",
         ("scoring_func", "num_expert_group", "topk_group", "e_score_correction_bias"),
         "know how vLLM's own router selects", late=True),
)  # fmt: skip

# ---- a server runs

_LIVE = (
    Seam("vllm.v1.engine.core", "EngineCore", ("preprocess_add_request",),
         "keep the prefix cache apart by routing", "live.prefix_cache:preprocess_add_request"),
    Seam("vllm.v1.engine.core", "EngineCore", ("add_request",),
         "keep the prefix cache apart by routing", "live.prefix_cache:add_request"),
    Seam("vllm.v1.request", "Request", ("update_block_hashes",), "keep the prefix cache apart by routing"),
    Seam("vllm.v1.request", "Request", ("cache_salt", "block_hashes"),
         "keep the prefix cache apart by routing", late=True),
    Seam("vllm.v1.engine", "EngineCoreRequest", ("cache_salt",), "keep the prefix cache apart by routing"),
    Seam("vllm.v1.engine.core", "EngineCore", ("collective_rpc",), "ask the workers of an engine"),
    Seam("vllm.v1.engine.core", "EngineCore", ("vllm_config", "model_executor", "scheduler"),
         "change the routing of a running engine", late=True),
    Seam("vllm.v1.engine.core", "EngineCore.reset_prefix_cache", ("reset_running_requests",),
         "compute running requests again after a change"),
    Seam("vllm.v1.executor.abstract", "Executor", ("is_sleeping",), "leave an engine that sleeps alone",
         late=True),
    Seam("vllm.v1.core.sched.scheduler", "Scheduler", ("requests",),
         "compute running requests again after a change", late=True),
)  # fmt: skip

_ENDPOINT = (
    Seam("vllm.plugins", "", ("load_endpoint_plugins",), "attach /v1/cor to every server",
         "live.endpoint:load_endpoint_plugins"),
    Seam("vllm.plugins.endpoint_plugins.interface", "EndpointPlugin",
         ("name", "required_tasks", "attach_router", "init_state"), "be an endpoint plugin of vLLM's",
         late=True),
    Seam("vllm.v1.engine.async_llm", "AsyncLLM", ("vllm_config", "engine_core", "logger_manager"),
         "reach the engines of a server", late=True),
    Seam("vllm.v1.engine.core_client", "AsyncMPClient", ("call_utility_all_async",),
         "ask all engines of a server", late=True),
    Seam("vllm.v1.metrics.loggers", "StatLoggerManager", ("stat_loggers",), "publish its metrics",
         late=True),
    Seam("vllm.v1.metrics.loggers", "AggregateStatLoggerBase.record",
         ("scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"), "publish its metrics",
         late=True),
    Seam("vllm.v1.metrics.loggers", "AggregateStatLoggerBase", ("log_engine_initialized",),
         "publish its metrics", late=True),
    Seam("vllm.v1.metrics.stats", "IterationStats",
         ("num_generation_tokens", "prompt_token_stats", "time_to_first_tokens_iter"),
         "count the tokens that went through the model", late=True),
    Seam("vllm.v1.metrics.stats", "PromptTokenStats", ("computed",),
         "count the tokens that went through the model"),
)  # fmt: skip

# ---- our commands start an engine

_COMMANDS = (
    Seam("vllm", "LLM", ("from_engine_args", "collective_rpc", "generate"), "verify an engine", late=True),
    Seam("vllm", "LLM", ("llm_engine",), "verify an engine", late=True),
    Seam("vllm.v1.engine.llm_engine", "LLMEngine", ("vllm_config",), "verify an engine", late=True),
    Seam("vllm", "SamplingParams", ("temperature", "max_tokens"), "verify an engine", late=True),
    Seam("vllm.utils.argparse_utils", "", ("FlexibleArgumentParser",), "take the flags of vLLM's engine"),
)  # fmt: skip

SEAMS = (
    *FLAGS, *_CONFIGURATION, *_LOADER, *_LAYERS, *_ROUTER, *_WORKER, *_OVERLAY, *_LIVE, *_ENDPOINT,
    *_COMMANDS,
)  # fmt: skip
