//! CPUID feature bits by name: those of Linux's `cpufeatures.h`, in the registers that hold features.

/// A register of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

/// A register whose bits are features: more of them is more, so a guest's must be a subset of the host's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Features {
    pub(super) function: u32,
    pub(super) index: u32,
    pub(super) register: Register,
    /// From bit 0 upwards, apart by spaces; `-` has no name.
    names: &'static str,
    /// Bits that say nothing of the host: topology, what the VMM or KVM provides on any, what mirrors CR4.
    pub(super) free: u32,
}

impl Features {
    /// `cpuid 7.0:ebx avx512f`, or `cpuid 7.0:ebx bit 16` where it has no name.
    pub(super) fn bit_name(&self, bit: u32) -> String {
        let Self { function, index, register, .. } = self;
        let named = self.names.split_whitespace().nth(bit as usize).filter(|n| *n != "-");
        let bit = named.map_or_else(|| format!("bit {bit}"), str::to_owned);
        format!("cpuid {function:x}.{index:x}:{} {bit}", register.name())
    }
}

const fn features(function: u32, index: u32, register: Register, names: &'static str) -> Features {
    Features { function, index, register, names, free: 0 }
}

const fn free(features: Features, free: u32) -> Features {
    Features { free, ..features }
}

use Register::{Eax, Ebx, Ecx, Edx};

/// Every feature register that is compared.
pub(super) const FEATURES: &[Features] = &[
    free(
        features(
            1,
            0,
            Ecx,
            "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca \
             sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
        ),
        // x2apic: KVM's own APIC has it on any host. osxsave: mirrors CR4. hypervisor: always so.
        1 << 21 | 1 << 27 | 1 << 31,
    ),
    free(
        features(
            1,
            0,
            Edx,
            "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi \
             mmx fxsr sse sse2 ss ht tm ia64 pbe",
        ),
        // ht: topology.
        1 << 28,
    ),
    features(6, 0, Eax, "dtherm ida arat"),
    features(
        7,
        0,
        Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx \
         rdt_a avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel_pt avx512pf avx512er \
         avx512cd sha_ni avx512bw avx512vl",
    ),
    free(
        features(
            7,
            0,
            Ecx,
            "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
             avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid kl bus_lock_detect cldemote - movdiri \
             movdir64b enqcmd sgx_lc pks",
        ),
        // ospke: mirrors CR4.
        1 << 4,
    ),
    features(
        7,
        0,
        Edx,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear \
         rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 \
         avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities \
         spec_ctrl_ssbd",
    ),
    features(
        7,
        1,
        Eax,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - \
         fred lkgs wrmsrns - amx_fp16 hreset avx_ifma - - lam msrlist - - - movrs",
    ),
    features(7, 1, Ebx, "ppin"),
    features(7, 1, Ecx, ""),
    features(
        7,
        1,
        Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchi - - - cet_sss \
         avx10",
    ),
    features(7, 2, Edx, "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    features(
        0xd,
        0,
        Eax,
        "xcr0_x87 xcr0_sse xcr0_avx xcr0_bndregs xcr0_bndcsr xcr0_opmask xcr0_zmm_hi256 xcr0_hi16_zmm - \
         xcr0_pkru - - - - - - - xcr0_tilecfg xcr0_tiledata xcr0_apx",
    ),
    features(0xd, 0, Edx, ""),
    features(0xd, 1, Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    features(0xd, 1, Ecx, "- - - - - - - - xss_pt - xss_pasid xss_cet_u xss_cet_s xss_hdc xss_uintr xss_lbr"),
    features(0x14, 0, Ebx, "pt_cr3_filter pt_psb_cyc pt_ip_filter pt_mtc pt_write pt_power pt_psb_pmi"),
    features(0x14, 0, Ecx, "pt_topa pt_topa_multi pt_single_range pt_transport"),
    features(
        0x4000_0001,
        0,
        Eax,
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi \
         kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control \
         kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - \
         - - - - kvm_clocksource_stable",
    ),
    free(
        features(
            0x8000_0001,
            0,
            Ecx,
            "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit \
             wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc \
             mwaitx addr_mask_ext",
        ),
        // cmp_legacy: topology.
        1 << 1,
    ),
    features(
        0x8000_0001,
        0,
        Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr \
         fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    features(0x8000_0007, 0, Edx, "- - - - - - - - invtsc"),
    features(
        0x8000_0008,
        0,
        Ebx,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - \
         amd_stibp_always_on ibrs_same_mode - efer_lmsle_mba - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc \
         amd_psfd btc_no ibpb_ret brs",
    ),
    features(
        0x8000_000a,
        0,
        Edx,
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter - \
         pfthreshold avic - v_vmsave_vmload vgif - x2avic - v_spec_ctrl - - - - vnmi",
    ),
    features(0x8000_001f, 0, Eax, "sme sev vm_page_flush sev_es sev_snp v_tsc_aux sme_coherent"),
    features(
        0x8000_0021,
        0,
        Eax,
        "no_nested_data_bp wrmsr_xx_base_ns lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_known_bits_have_their_names() {
        let name = |function, index, register, bit| {
            let of = |f: &&Features| (f.function, f.index, f.register) == (function, index, register);
            FEATURES.iter().find(of).unwrap().bit_name(bit)
        };
        assert_eq!(name(7, 0, Ebx, 16), "cpuid 7.0:ebx avx512f");
        assert_eq!(name(7, 0, Edx, 29), "cpuid 7.0:edx arch_capabilities");
        assert_eq!(name(7, 0, Ecx, 16), "cpuid 7.0:ecx la57");
        assert_eq!(name(7, 1, Eax, 17), "cpuid 7.1:eax fred");
        assert_eq!(name(1, 0, Ecx, 31), "cpuid 1.0:ecx hypervisor");
        assert_eq!(name(1, 0, Ecx, 13), "cpuid 1.0:ecx cx16");
        assert_eq!(name(1, 0, Edx, 26), "cpuid 1.0:edx sse2");
        assert_eq!(name(0x8000_0001, 0, Edx, 20), "cpuid 80000001.0:edx nx");
        assert_eq!(name(0x8000_0001, 0, Edx, 29), "cpuid 80000001.0:edx lm");
        assert_eq!(name(0x8000_0008, 0, Ebx, 24), "cpuid 80000008.0:ebx amd_ssbd");
        assert_eq!(name(0x4000_0001, 0, Eax, 24), "cpuid 40000001.0:eax kvm_clocksource_stable");
        assert_eq!(name(7, 1, Ecx, 5), "cpuid 7.1:ecx bit 5");
    }

    #[test]
    fn no_register_has_more_names_than_bits() {
        for features in FEATURES {
            assert!(features.names.split_whitespace().count() <= 32, "{features:?}");
        }
    }
}
