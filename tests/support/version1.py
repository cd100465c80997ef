"""Compressed files that version 1 of the format wrote, and the CRC-32 of each tensor in them."""

FILES = {
    "haar, 8 bits": (
        {"0.weight": 2472502318, "1.weight": 67039675, "1.bias": 67822631, "2.weight": 3793953727},
        "c-"
        "oayJ#5oJ6gEO)KmsOUtI)Aj;?&+xd}qh4kQfl`Fd*BqE{#L1CUz8G8l{m{VBlv17R127#=^kBfKVBLjjbCSBLyJ@"
        "3lj?OoE9ZYQG_L*-h21H_db8``Tk+6e1<5B+Obx3rBxK6>JT-uZd++oMIDVW>Z^@Tx0lA?4+FFjck?7m15~9rK>I"
        "jw;ckorI{;*W3P@<F0RYC=WT_t~*PAB6570%<0)%~rDdw1m7(z{@x+YfoP$TXpSv}cQx@?HkUaN&0s+GrBcYCo($"
        "p`IP)`I$AZ|1sQ8flisU{DA94knmMI7o;Yvt8TaHW8RrB(n+Q)ZDwK5Iu++$A%p(xh3^D)rlUMco{3%%%P;xe3Fp"
        ">D1(laj~NjxB;l@*Hm1Om8aVrxNDSLkB9;Dsi?q+EmS|%zvZs*^2Z+wNOC>O(0(0qd*XGg?GcO6vJlC4>+Irq=&y"
        "JKkj&NOGp>kSIW((=KT!?YJmMDXT7-NFd=`R+%LSQU}6a{S0UbflDx*l}Q0)if}k$F=Y&j-"
        "S&+}f<s$YTweK8VYJ=wD)!;H%Cg)}95!a4Iq^8_z+r1JD(TW!am}?JZ`}5@t-"
        "Cuqe(ftnY5yE00&7em;Bt)$TFxgMZvxe7XGFy7a)Zc5c3Z^ZMkK<)6W`k6VL#r+-"
        "{{67{`bTaUaux9@u2Z}D?So^M;Lhv2`qZ(Q@fd|mWDx$nNEJ1?RUT?)lQakO^ovi0z7)3QdR6Mq0YM?Xy",
    ),
    "db2 forced, float32": (
        {"0.weight": 230866547, "1.weight": 1035786511, "1.bias": 67822631, "2.weight": 2857616297},
        "c-oy*zl#$=6yB(y77D^4*aRIBP8f7&W_NZr+$D-"
        "478Zh7NOlREWMh`w{BU=2Ar}JYA7E$UmG>7|iH!+%S_}Rt<O&N>kt;;e=D;_zQF25%@f9EQzW2VFH*X%ZzTeO`M3"
        "qV_ltDd^L8XEUL)7Rbtw5pz>Pm!BKUnQ1y><xx&_k<Xl181jhYAFH=$8&$h-"
        "Erhd!Y2t2omC80D>%Rp6iFv?WRg7d*}+I9>Qgc31*o27^r$xQ`+@VI%vW6NmK)lV43tn4Jy=#JAu@C53QxLt{2rv"
        "!a>-@WfPm&vH@HlyC&m|2x?-=Ou@NrIS^o6ZA1Q45W}h@q6>=ZVOvIWpm@!-"
        "dvTmWBZ$*~D~M$UQ33#40GP~n1h>hQ@euu6XDGI3JEPtI?hG-ft#JW_kEtuD<q}REOoi=mSh>16)K^beYlgLzwAY"
        "${J!*3<1gD(uZXy%Ju^q=18DEV8rR9#G6y9L>J-"
        "I^&GdZ(HBN&uvwi>>=9CX#JK^I{7(q^E%GE4;01KMdc(ojMsT!pAYe-"
        "}0@zA0w3wlyy%6m#zDgZEHVI<JO{3!&6>&$FF*wGfzCwm%x3)RtfQIJTEImN!3~E-"
        "gMfzhhiIl{4Od&G+BE>1<!%cMm^VxRpF#*w}gf;u_C=`8*jfkBdb>WBtJ8r^gN%My3i3W9$1`_j>Q!@q?36>1@Vc"
        "%o+LZxA%`!w;ojQd|JHss$YH<Kfd(v%*z|;<_U`*oq!dUO$=jc-w*f@egZ_AL>>",
    ),
    "klt, float16": (
        {"0.weight": 320515162, "1.weight": 1425237580, "1.bias": 67822631, "2.weight": 4082526738},
        "c-oy*ZEO@p7~TSff+pM#8q-jrS)hDmfZf@<-MPEnS)&mP<x2=gysOQ&x7VJ%-"
        "d*nYz}j3n`4B?Iq=`a_2?_;s8h#MlO4GX?!Aej{N=b|)O-"
        "!)W*eaODYJ!Av&TjooYfRj1CiA}YJkR^g`)+o87GponY;|>`ZfF6`(5kChPcs{g#v3(*^{_F61?*mJPb{8{=rnHj"
        "vwQS-A{34ISq~5V>>oTD(z7WZ-TNui&!#9KtTj=>)G@biuO6zaw*WpryFq|{7Wg3GfdGUmKvNB2!%Ep<BpD7*EkP"
        "}u(18(8>Qz)Q7>;TNFH)SJeI;Q8>`hI`pfv!GfR6(LbOHeZ&QgI$L?T2IlxUiB@h)D3^u%o`@iW;GfMtlc?Suk)#"
        "0VKpR^HD2A5WrXi35<Q3zeXY6S|-"
        "vxe#Y(tR~gg>$MGuWaIQc@os^4BM!Owe;O8$B+%PHXs2sJnne{Q1feKcQ1}<r$st-"
        "$lmwJY(UJTPx5gYWnqt;e>DB3&6ZM)E`DoWz`%{Ppg9+WBNO}PtQlo#W{yW)f9t5uG5<CQMTZ5ZHV;A~+eQ^f58v"
        ">_Gs<Q3>2Oq-ebjk%z$z7F7m6eq(X&5tI@=4|N=rZ*jJWj@kDoO1x9cCu}z&t(DiZ_1qEZOcTCcC{gq`cz<NzPTs"
        "^0lq_$rcAL_^A{hQ;x_*bIQr(Wj^J3aDw#S4-sa(oaDD|#-"
        "G2{XO7)R<oLjH{I;=DUGV<5cn&#;SId`jj=DEV_lB$F%+uG*CB5_2v!@ExbDN8Cylt`E8_$wM0~2z~{4dE4@(y0{"
        "LO=d&=n8p!|1)YVx{?HLy=%4~H5Dl`mhC*c9Z&RcGY_v>p$`Ad;rC>PESfA)i#iUFSNCVk^&_+8FY1!``?1xyr@t"
        "Rhlvd)U<|XsM2ZxBGeWzOT#wl~tOLx4tJ0Hb`_X=^#$4@D9PYz@6cW0EzBLn8OP`A11<rmdfpD2IzT0YmdxES|5?"
        "8{c%e$4#vkx#Q-`BHgdNuhjMcgagX*{6=~{?XHRa7*qU`vXyajp52I&*8Jjbet(-"
        "u(RD`zP_l!d;RN;YG!aGduQ+of(A!P<<<pe<hmC(-CT(IVFx~Zt0Fgaqc68^-%fQ^_xeeu;x5DVtm-"
        "RJn2R4dyV6WLowoi}Y3nUu<_*ru=Vwm=HHJBVx3n`OU+i+C3rPJ9BCo(H",
    ),
    "uhaar, pruned, step": (
        {"0.weight": 770729796, "1.weight": 3746755975, "1.bias": 67822631, "2.weight": 3667684462},
        "c-"
        "pN}&59F25FYdi#JvfNv><zE+^+tei4kuicoq*cL+orOX4uIOGd;V;kfRUbaUa5?Z=kSGAc7wJc?QAio;7TUB8q(|"
        "s=lhP`s?a?el-ebMFxXu;q1sdI~b7Oij3#=)H>253r8q9wI_?ZofR0bGICPXO*x-"
        "sqz5!3KY18puH&JfAu}UuEU4@f30<1qIW5X(6JL;K<bmKBp(&?81r<3(sGV3_doTdAwyHWawpCM5SGPruEt}<ZII"
        "plL`Y#$c3eK=}9?>+Flu=M<umw*H7$Fi7Q)8IHFwvMvd>i<c8bQ4t2x`hvF>|F`dOTqNB8XoI0&jA!%1CXLN{s4|"
        "jPT!$g;TXXmH_;Rv4D;hV@bj^6<Qk|OR2ffv)upL(WE#!ZrbVYw;3ZDaDl~J^OMX74g#bI_^`B|s!hzf7O?$9fCP"
        "X+to3@08*)+Zw{GN?3%_JI0o=M~VttgNToN{OJ{~uP!^#weaum7|cA5M*zQpBxmkgW=nTL!2zy`g`7LqDIq|J-"
        "|>TboTLFMb4;p`uOd87KT?wx(Ub${>4*SiO=55GqbA&NeHIwx}P{OOf%?{4=y^jZ}4<iXja>-"
        "|mD+xIv2KOVk}qaPz;B7g",
    ),
    "dct, ans": (
        {"0.weight": 586543413, "1.weight": 2192756662, "1.bias": 67822631, "2.weight": 2876837768},
        "c-oy(y>HV%6nE*!K&8UMP@${D!U^4{eGaKu5DRnE!M37v;t;Ej9mSWnQRF`a21G~H5k@`+MuZR&>R-"
        "UX$H<JrI~%G*Z3lXipWl1;e(!$wyLY(m)N78q-BDt6UmM-"
        "+qShP@ipfYD)Iwu}Fgnot<H<BnAfAV4Kbe$ik%y>7aftrmAcVaJ2Yv|15LHl+=@|f;ZF2V@NgoewK@g&coP`Jn3{"
        "%W8k1(YAJ!4aKm`}5;F$0~I2{w~y5<$aqHj0Z3I)bnB<{ziVI#l66V1gM111&fqL{Onzf~9h$;DT~YnTLJbh@QuW"
        "W6OuuY|?&`o7Bu~zRvv*rM$=!aNLHG4<CtYYCiL%>$<EaLM@zKBn!iGS(ZAyj4b}DED{v)h4K_;%5xR>z%*<~WS^"
        "`zOnQ6ebaeLBC{a`q<qNs0A7efd+*h>8$Emhh*HetSoUUGxOW_kw`ixf<OvvAIJ9T|C8`~iR1z_sRp|()~gi$@2#"
        "b8h-1}XyrY=P-"
        "1vt@8cEn%5D3#JSUd(Tt;7ozDoM++DwZqe*AXG@M1jjHNay|(tgzme@HJ4fHP?_b~jaqm5Q`uQcga_8h~e7L#sB9"
        "=GT9A~ju|M~HD`_swS?dQ82)s3S^o9%bUAAUV}_3U`7lfRySdAp`N#BqKvuKfXWW+~q",
    ),
    "bior2.2, percentile": (
        {
            "0.weight": 4249135620,
            "1.weight": 1035786511,
            "1.bias": 67822631,
            "2.weight": 2156844389,
        },
        "c-"
        "o~>O=uHA6yEB=pO&7qcq(N?urM?`GrK#p!6u+09#!y^4RO+J+NJp;J84NmphZ0NBo)C5LGU079z5wm=^jNdih}VX"
        "UcC4NUPL_=oSBW%no15X%wy)8_r3S+H*aIFp}#iB<;uR`1ul3l2a;`2tk%n1fF!610Kqa}s?{46U!L0@Sn}&(P_1"
        "|%iJ%95^W;(9#XPz9B+~;OnNZ?QNr<n_nPoqiUr-"
        "4d51b*`12BUjf&`K*lu$mX*71ynH6+XU^`Ke^T3qO!GFQ|aJ}mN5=&So;smg^e<bhTw3VM?dM5uBdm@%OVDUrd-L"
        "hK^sIvAM@TG(<Cu^p`Lk)tZ1-NX^7<RL9CDEJi-h^E3dR%w(<anN$KvSFG?ED0mkH>-"
        "k4Y|0!P^$`!?f4PLA{kKaR`cIc|EXk%aNY9Dunl?p_WlNQ|!z_z1S82mp^`3JJ{@h~NC=Wg<u`HL`%%XIsn}i{1Q"
        "|dBD<N1Iqu0t8d4naGA*kX(!*R*h_Bd4dIttPS{nl&|m(hfP1;R08ujFb!X)K-hd&=)c@(--"
        "<j*mm+owv9{aAX$3B+^lXqgpKhaTiS#WQgl3w?wGqYmm`3v<aegxZ*uX|rhVe(?Cp<7)5jkswv4kQdklU9_YU;lb"
        "zk1SKK7yeiY2d%J|4d?`Ze_i-"
        "8=vGdFjFWd~xN=se^0xGYRrze_}I=qEt$+R5Tk!lil1{T#OsW`=71axyJX2eNj3+9iyuw#`@{QMsIcF>7$j(k+m1"
        "o$G+uHCU3!O&DWQn*yB?Z?DN*MLs7q^T37E}{ssOIT9g",
    ),
}
