"""CZI files that ZEISS's own library wrote (pylibCZIrw 6.1.0), deflated, in base 85.

Pixel (t, c, z, y, x) of a file of height H and width W is ((y W + x) 7 + 1000 t + 300 c + 50 z) mod 60000 (uint16) or mod
251 (uint8; colour: that number halved, and a third of it, are G and R). `mosaic` was written in two halves.
"""

import base64
import struct
import zlib


def unpack(name: str) -> bytes:
  return zlib.decompress(base64.b85decode(''.join(FILES[name].split())))


def write(path, blocks, kind, um):
  """Writes raw blocks (pixels, {dimension: (start, size, stored size)}) of a pixel type, by the specification."""
  out = bytearray(32 + 512)

  def segment(name, content):
    place = len(out)
    out.extend(struct.pack('<16sqq', name, len(content), len(content)) + content)
    return place

  def entry(at, position):
    head = struct.pack('<2sIqIIB5xI', b'DV', kind, position, 0, 0, 0, len(at))
    return head + b''.join(struct.pack('<4siIfI', k.encode(), start, size, 0, stored) for k, (start, size, stored) in at.items())

  entries = []
  for pixels, at in blocks:
    data = pixels.tobytes()
    head = struct.pack('<IIq', 0, 0, len(data)) + entry(at, len(out))
    entries.append(entry(at, segment(b'ZISRAWSUBBLOCK', head.ljust(256, b'\0') + data)))
  directory = segment(b'ZISRAWDIRECTORY', struct.pack('<I', len(entries)).ljust(128, b'\0') + b''.join(entries))
  scale = ''.join(f'<Distance Id="{a}"><Value>{um * 1e-6}</Value></Distance>' for a in 'XY')
  xml = f'<ImageDocument><Metadata><Scaling><Items>{scale}</Items></Scaling></Metadata></ImageDocument>'.encode()
  metadata = segment(b'ZISRAWMETADATA', struct.pack('<I', len(xml)).ljust(256, b'\0') + xml)
  head = struct.pack('<II8x32xIqqIq', 1, 0, 0, directory, metadata, 0, 0).ljust(512, b'\0')
  out[: 32 + 512] = struct.pack('<16sqq', b'ZISRAWFILE', 512, 512) + head
  path.write_bytes(out)
  return path


FILES = {
  'tczyx': r'''
c-rlndz@8M`@q-pto1x=my|?O$}~dM>D+HQ9ZfS`MprY_Wk#ue&e><0nwe^5(nXY_h*A+DiU<)Rln^08ga{ELM2HYc-aXBvdO!Vs(;xF{=JUSm^Escjp69
H!_Bv~S&vRLO=VfMRrS<QU*`u?lD0p}c;_xyfbwV9%Q5v6Yt$d|*LpkT)<?=oqTUGQ;NfG}mwY=o*=Oepsr%pY3r*{`(NF^7&E9=3P{dQK?8U4zMNx>t{r
R~pv%67d&>fFk9-
9zf0;&A@T>%1fA(vP6aIf5?x2)gPhk)EA%(lXL=(xQ<ZGru$%$+F4{3JZ$!GZWERC>9I_5?+VP?Xny`m+5hYTt2@e7z~HKK2JOuk697tAp;`LiaDHrPg=f
d^~K5JG;xMFSGYw;oG-fAo0B6h5;0LAMv5`wa&eWoPTU}F6?cmJ#KYnV@r-
y;ye8fjABa!ISK@o|i`Xk9)P;u71Wt#uzyUru4?006^nw0xF<4Ltr7#|@fUDtpxCw5DyWs(N6js7>@G`ss@4`p$IeY^@!f)^wFdmO5VKYp{bI^rBjACc(f
!UacCJx0BcnMyHSK_re2XDcJcrQMLkK@z$0=|lG;rsXreu>}V&-
e$TtRqj5r^puaOxad?WqX+>tBJpb>OaLF)FS@;F3S_}#DWf&6%IOley`UNO8C7FkIiG)XEPWG2CCrCBf_Gi=qh@NzG9$=i(z7v7%L`<sbYq>QQRi(68DQo
#FOG#@sfC5ydypopNX%<58_wxr%-SloCv2v3Y-n?zz-2fhYR3B7yyGI2}Mu_m%?PY24=y{a0lE255i;c6g&^Fz?<+Md<<W}x9}7E4gxjS$CL3iJOj@~H-
_+h?1DWp2QR`H7T`!6gO}q~cpct=x8j|6A3lsv;4}ClzJ_n(2ly#|h2P^ZxEH0YD;vrt@^pEYbV#2(Pj-@-vXAU9FP4@pl%>_hUyA-
u@rSjDKd(O)_n1D*;dY0-4qwn0cZ32V+Y-htm)i{3CeY`rg1>|qE=t5WF-
c4lGsRpnUn~+!#4@o$tQKp<da+S#7F)%3d;52beS)AKG=iqk5?X^30?+|6pgUwiE)0QuD2CB60j9uom<{t_0W5~4upCyw8dwJ#U=wVCZLkA&!5#oKumLv4
=GY3`pa;X)5xZh9?27|2j>B*ij>U;M6=&d$cpKh@_v0h@BtDBT;p_Mgeu$sp*Z2eeihrV#$H^1rsWL^LE!#=IjL39(fxJ)-
kb`AX7RfSsshljYk+bB@@(y`Vwb{Qq|D^wgn#x}|5qEo%E{ARO+%|Q-
kRz6exg9RQD;SG~ydjq>UIl+`!3*sn4Z1;Z=m&!!0mGpL#=#_*1~XwU%!fs=1eU=HSPg4oJ#2){uobq$PS_3mfUq7m!lu{~TcZ;L*a0)JJ7!@n4#9jZ#?d
$dr{Hv)jq`8;F2<#}99Q8QT!$NQ6K=t6xC3|L9t3H~2C}hiE?dbq(j&vNqwFes$-
Z)+jLTtilpHH3%BgaOyiwjJ?~?b+N92?8S^1KDUA`kfl%L73<qz^#`KMIsICY{rRi&u2RXgQZ5tXhkP#3BJYOqSGB2``XuiiiDe`_j#v2em4_j%)vgg0b5
d`TO^uw_G-uqm`+W-=TKSH)jVip{#o-
m;$@BolJDERo~nBsopalyl{LxkxUN%j62VTCSDr<wm(#Zk5~RPPtp|lcegYMyjc5sah+i3aAb$Lv>eKDpw6r`KnlrRuj||HC@eC^VEXs;%{O7f71WfRQ}w
yg){x8%VEXbE<65n+y2+%^*AgmmNetuK**c)SHWLRip|E$E9BMkdU=z)UEVDpkdMlh@;Ujkd_%q~Ka!uzZ{&~iH~E)jb-
X%BHB+hT9OY6$6;+*850$O*l&OZQ5$Y0knYvP4tLCU%)IxQydPqI4o>niYSJhk9X8#%<>--
mL0Dm6S?f1lNhZ_i#$A3OgxZM5)9R83m=nn<G$ymr;1%F5Dx60I|YO=aU%~Ch3JJdbuLG_q=N<FV$QE#gE)W_-
z^{x6z{jLOQs!u1=X><miOKu9$`P7AaQVv~2F)E;uG=?sxtLQqqfo`Qc={|axo}g#wMS6|irVr>-
`ij1%UuZ8$uFDO%37^hqv4eel9(UqQ?!*20Vz#)DOL;tB!B_M3d=uZ!ck=`MD6iz__+@^B-
{p_^bN+^Z<lp!&W_`RqNjKA}`W#(d_OH>g&VOqHf0mVqnQ@=LJmH8te6FDBhz0C)*d0!W!XbAk9`|{w;O}Vt)?&3(Emy158nsSsP@B{iwN33%yVM>9WKaW
YOwFkkwIL6MsUvlzUeuQcQk;g-
C>l!>X)4X28|gN>i|(gK=t+8(UZU6O9r}<yqp#@)`j!49#mDi9d@85#+1!r(9N~1nfG^|$JeZSQ#ASRbPv&cQ7T?Tw@ICw>KgLh-
^ZW|G$?x&U`~`o@Kk@G@wAS_Y$@(;XhCWxjbx5DDyXc-eM_*K3{G~KL*7<Ku;Lq*%x_lvT!VxrG9)~aB4m(1LWWbRK1bqpY%k7PasyhEWTEF$a`b2%HzEe
M|KNM0OI)P517IY@HB`>w7H0nmZsUHoZ1P!MW8b_088qK7+G@lmH5?V$pXf>^+^|X;T(^lF}J83uVBjS48h?{atZp}^(a0kxd?wrNBJcRSPm`C#jp2E|4H
qYY)yqK5ra$d!2cpY!xO}vG-@eba_dl<B#8|cQmxo)M~Xpau-
j=HPvrTglEI<AN5QF^SNsHf@~)n@;i9P9kIM(}63gW<T}>u?2Kwh@d4la5%}Ceh<dhLb)!_%qE!75tq<%_x=5Ar}QHN}Z_(Wm6uRG?YfrC3G2GN!QXGx`h
_fz4Q=0PEXSd^eVkY@6#vrC4EOf(;tLfhfm;BxCNidZQ0B1IgPt<Z|=u~IKjiYgvaqDp2jnIF3;yhyo8tW3SP}?c|C9B&AgSj^G@E)`<Qe+-
AFgpEp=<{)B)W=XXx%aOXun#I$sy-(RzZOqNnTGdY)dO7we^Zxn8B$=yiI7-
lVtaZF+~^rT1ts45NY3*l2FFGTIm(BW!dux*ENVzD9M~zh=ie|E&r9`8@7qA{>v~UN_`+_`<g9jk)ZW%jJs)J)V%)@2e{Qt4Xn$O9ypSch)_0w$9V09;!#
^OY~*>N`0-Kqi@j*^}YHb{kVQwzo1{$Z|V2-C;ChMo&H(>q0y*goM4<{v@p&z+8SP?y^&^gGkP2Sj6p`i7;cmp<BUnhwCdt-
Ve@01|JDTlym7b7>k7skJ~I}!^WUV`5enFmpw}!vhIU&X+ay-OUrmb5V!A+&)MNDJ`YL^$zCqur@6`9{hxHTs8U3PuO~0)_(4XqB^!NG~y;n=4uF=qFVw`
TAWjG9<ah}o1$Ta#G{f&za%P2HTjq%16#?{94#!bfU#@)sP#-ql{|BJr^`(Z08Q{=ssN7Z}rzx(-
kB(uoOw=zb=M;BSeWzk4atISN8Wo9&zS)3eEQe>7Dj3|y)^omBZ3&vXmqHa6usA%n1<VM}D3Po;(A}{K#kn<|!^l0UP^a?rWfSgkyXGh%?a(0E>^MKql8p
$ZI*Hvn-!Nxj$s99WW6&`G*WF|VKR<_%_Qd4@FMOKH@jI=(PsnJNEg0WU%&bX0Qv}=hu&K-
z24{9RL%27w2%6(ueGhS9ueDrfU53bO8=)(X1;gx%P@E+t8loeXhvG%`te<PAUqG<mYBgYjM#M1LJOU9(+Tg6t1S!UVs&w+34Oa47W+Q^ZG1@X#zSN>BD8
5?o#S48?*CFRSD2HLsX+4t{&7;zpp*m)QR*>SVn)Yv?fSw*Ggcc-+>ERI|IcW;2bQT@!q(N@&c&TrX4n?31%v3xTs`u*F8+`mU0UH`m;SFrmBj?~{-
xiaV9OLZPZ+Icwa2kk>fW>)9)oZeZvVqv8TnPnXAXO2~=P4A=BrnAG^^qjFa<%G5A{gv8u)>xaKOV*|wvNpZ%Qk%{uYtwVg+MIL#3+XT9eE
''',
  'rgb': r'''
c-o8d3=VP(ck}ddWq<%CRGN_i6||=D+>?*nJH;ro<Aa32abI*kNX-Kdh*||!hEXuYK@>QB1cy2~`S?3~1LGE&E{;R#c&NGzXhLxbV+O@M6E?Hhfj9!n=0T
z(p=>TB+Lr+}{ekExEMm@B#6qx$1!EDT2C(sU4RLgF3~{ux2}w*ZwzCOJEy>Ku%uDx7u}d~IN;5DrHP$t;OiI)>F*7yQO*F7H)-_5qv`kGjN-
{G@O|;QR(qN+xF+(42C@9pJnfTaQM7h{y_&AjXxwS<33?&3CWQ6SHMctIeebppGv}B@n<&q2)GEI~VEL6*_)$8oFTAg%y-
1H`U8qV@HUKn7yBE({SxYf33o4s-NN0J;*r#fHCbi0}3@u0x#d9m-
ia{sSYfxsZ)U}55CXBFdSm*wMB5#rGn<uj5Lu#^#YP!M%j7WY$^3e}Q{(UVIyRLn9}F0@dsu+gZu*J^Xt>2=ee;$=A7*LYE&*~$=$4G~t`qiy%a+aFDGJd
@^fIn(V{uE)ay?-
wP$@5}waRR=LKGH|jm3vjTCbF<6wbEyjP=!o$dOA1=a3Og!@dZ<YFt4oDx%f#x*rx+<_n<^Jss#V%(G&pFrJL~qj>reGEoa1M*IM8fWsKv$z>m4z+`{V78
B|Du>bGee`c01SeQK9$C65kIM0pF{Gm>C(lSeXSmSS5Hk<oUVOgn4wu_)Vk)t!0Is6vaGMBmy*~2&8{ld@wL9V1|gpX{M1~KG=BXCZ?yl<R_QrrskE{+4!
cGB&H;mB-+_{=B4Eq<tCP7=I7Z#RN2`CXI7;~*clqx=tEdwfk-
<;1BgH*L?Ft}5W<gw@SS0NX9zz8#t(t;gJJw&2;UdR_qDTe$ppHq80ZFIwsOu$%*#v7L9i4&Q*4!>Y%2pLJDY&aiqxEt%7Roor}QEt6B~VmfQ>#>A%X?Us
mSKz)eQ{+L`a2XmgJ<`RRHrmm|^3bp9_{KsLaVsa*pyWDpyEP%}XsxEJ;lPS_zc}+6Xtnv7jI)GZ`Afeu=rMNP2Db!2&j6sYM{y*_r7X>H$L;#<kH$(X5X
WS;5JPpaKaPYbB|<#h@@OE=kNwP6Y>71TdJw5_3vZ?F>_O4a|T>f;pg&fT%)KA4#J6D8lOXq3+U$J5(Q$?DSC+Bqaa3cm}yThxi9YGB`jBejP^Y)&t~%p<
Z7C0K}w^9R
''',
  'mosaic': r'''
c-rk&2W%T<6#n1)k5EF(-V|!WhF<RMJFjp#>ey*<n=~bM)5MJQx9`8yU^}VflB8l3K><;Qm|}`D#1vCyi7BR-VyYA>XhBdwOfkhi=gv)BSxuy(wiZ0;^v3
_*yLbQh{{LPg8fy>Dn;vaxCN^O?2U1QmR}8FMGDVr(J#pcxWvkaN-B2(3ET3fix@yV)ROOTy?vL2qrlyv*@GL^sI1RDV;oXkkpu-
~_#RV5u%C)WabUJd)DBk7BwWD||Deu1`PgJmlE7;-
{Y_STqe}lBv=6EO)iidP9&U*TFt(_OrnRKovYUrGCw?F7M#iZ;vL{(N5F({{!qN#G`^`<xvGNwtR0yN3aA+1kZ+_W9Y?qo7K(E6<7NRp&U9~mIGlY7ZS<O
%W|d4>EzDAdBvuop~$IWP}S1P&SKhg;w-cmN)Sr{P8T75;`AoP@jKzSx2>Od!Jr*o({YHoONP#K-
Yj{1Jagq}$P*=$>>_@fS9Rf6X}YhbqTkmYKnmEFk*0YKm%7<zm3EctyozK6gOzsU9OZ2L4A7HwloV$#iQ&PA5yr1>`bv4Y`rLMOKkDWF7g2{6r1`5mYz|n
ji{`;Y>IWE`}@NdUze)h1Kv0d<ow}9UhJ{`ccPbJOxj~vvC<-
idW;y_$I!GAK_>CHSSLjrc<dx8)#^g@vqsO=O4CG{N0{Fk_D4~(W@BN`8PeXXz7NSO!0tERy~U9PmO{9R8XJ+LU0VU!4fzZE`lrII=C6$fe+wg_yWFzU*I
s5(1(o}!C81Jo`vV*C3qFyfN$VR{189IukZ&vh#pBjG)Sk>8FY}ILC>KV(#z?!^i}#ceV?wSpVM!tOE^@h7rcTdgoRDTf5PTG|642mvZ5$%(_@NqFv&zU<
+Y$^W<WFyQ)ND{;WNy@82ER<31Gm<kcT0-6Yhsc;3;?kUW3128=Q!{;y!o)wqqC0#~#e#BD@vv#ufM&K7%jeZwPb(-I4A=_oK7vTzWiB(Ua&xdK0~a-
bWv%Ptxb<&-70!2-
^$02zv`Ng=2+Ip<6J8?1uQ4>LFylb2XH%h!Fm_=OZneWj#F7n_86Rxq_~>@&Yqhf$3T_XZGf^tdQ=_>9&`y#nOv;r*$uAk}VAzx^%Z}8@g;mLU-GG!q&sO
6A-rbcxgRu>#>p^v-
Q@Jf2*!V(pFvlRt;8Lg%_|~j%P+BSJY^%bL0lO&NZ85d1D=`)3rJ2L7s^Z^>KYho(;Kunlxh3BqyYD9(O5Ea{PIuk<z5m6>mJ;+0>EEkEaV6t`AzrXjss~
z1iV~zM)Jy8BRp=1FjyP<9Sx#hV@Qo)q3Un457ZhOgiO&R{V@nv6?h&&^ma&Sf1{ych_6Ml~heC3zo|8mqz+RD({$a&EJt|dviG6*4{;?Ip<DxxUhx$znb
R#YMM=}X^yJqfBrv#^#GL
''',
  'zstd': r'''
c-
o8d3=VP(ck}ddWq<%CRGN_i6`bC%KK0MZgWuhlckh1r>dsYkK1fXiCq!)m8^b6V;vfo~K7vD?oP7M9y%Fi+Cp2NiL)FcK(k@{j2?ZvE35Z0%4#W{qHV+aV
31xF3(Y_3*=?_FlVG(o2A{K&0EEtOzHGqw;Ylx$ZV~C@jO-
N#Tv7Jp&YDs2JW?s5yid~winTb)VajI@oim8RJiFt~lu0@iiiLOzSiAj=?QBtC*VX}=rk_H=nh#C5DLzx*FHMZ*iRrpZK!Vtp2z|JQsqpW3UVejS}5}lM;
P+r&CGkMm+73;U{J#zZe%?Holef`7CB`6`UrfXvD<QWhimzq;t)!5NLZSIoQn|2;Je(vg>$FDyA_|L{GBCVupU~cE?6C9P8kzZEZ(miSBg5~SB?m2ww;*I
;y-hTPb#3>*yr>bLY<;cLu#EbwU3<^)4o+pq#KBJ|NDJbc~frVD-gK-
F@k5r>Xv!tZdL|x;=G+_EjHnY&RurxQ)O|~#kHZ?L&G)y)zBsP7xvM?NBH?nka_X~|l&MK^^Z|j{hd(p}b+xHzkbNSZ87w^CQW#JZ*R8ZG5wQ=?ejEGOmE
vatmoG^Xf(lwiR9XxUV+TACwKm8;xg@MusivUB13jfJZ)?8T1514y_0?ZKc572b-
fpKJ)uQr~!iRq~>`N^fZsd*)KHomDPi7AOCiFP)gd1?7Yxrrs2`FVB_RdzPPnN_I~c7{ea`VbaaAkxmz03r|x5s0#bDu{yco$U-
Ed}jzh1jY}6@PlFeU<ltA#`m?eamfU_s~G48V6t=0NX*LvMmL<L;F)5p1Z7(pDB0NrWLBi+gj5!!+PN1cRvMbw=p#gI^r0#dEKpKLwgA6&Xc!>EDkQTcC)
KV3m@B{x8|VC7utY&+PG*vGlxI=7LV9XmYEfcIY6{R!s4UP*xCxF01v#0?&@lE(%uPkoYoiYqun9{o0y)plOwUjc7|t-
RjXsKIeU#|ZM?|AOY6N4iUtK(dT%AMwgCZFoK=Z>5M%3omK!KrDpAW^l1ptyArZW
''',
}
